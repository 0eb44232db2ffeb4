"""Rotations before rounding: QuaRot (arXiv:2404.00456) and SpinQuant's R1 and R2 (arXiv:2405.16406), offline alone.

`surgery/rotate.py` has the algebra. Deviations from the papers: matrices are random, not learned; there is no rotation
while serving (R3 of queries and keys, R4 before the down projection), so the format stays and any engine serves it.
"""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qat.nn.observers.base import Observer
from qat.numerics.orthogonal import Kind
from qat.numerics.recipe import Recipe
from qat.ptq.base import Method, onwards
from qat.surgery.changes import Changes
from qat.surgery.rotate import rotated


@torch.no_grad()
def rotate(
    model: PreTrainedModel,
    recipe: Recipe,
    batches: list[Tensor],
    *,
    observer: Observer,
    kind: Kind = "hadamard",
    residual: bool = True,
    values: bool = True,
    seed: int = 0,
    then: Method | None = None,
    dtype: torch.dtype = torch.bfloat16,
    store: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Changes:
    """Rotates, and rounds.

    Args:
        model: A causal language model of a family that `models.families` knows; left as it is.
        recipe: Module name to scheme.
        batches: For `then`.
        observer: Finds ranges of rotated weights, if nothing else rounds them.
        kind: `hadamard`, of sizes that have such a matrix, or `orthogonal`, of any.
        residual: Whether the residual stream is rotated (R1).
        values: Whether values are, head by head (R2).
        seed: Of the matrices.
        then: The method that rounds the rotated model; None: to nearest.
        dtype: Storage dtype of scales and of whatever moved and is not quantized: embeddings, heads, norms, biases.
        store: For `then`; the matrices follow from the seed.
        progress: Likewise.

    Raises:
        ValueError: See `surgery.rotate.rotated`, and what the method says that rounds.
    """
    moved = rotated(model, kind, residual, values, seed)
    return onwards(model, recipe, batches, moved, then, observer, dtype, store, progress)
