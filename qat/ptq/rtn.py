"""Round to nearest: the baseline that needs no data, on the min-max or on the MSE-searched range."""

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qat.nn.observers.base import Observer
from qat.numerics.recipe import Recipe
from qat.ptq.base import nearest
from qat.surgery.match import match
from qat.surgery.walk import Changes


@torch.no_grad()
def rtn(
    model: PreTrainedModel,
    recipe: Recipe,
    batches: list[Tensor],
    *,
    observer: Observer,
    dtype: torch.dtype = torch.bfloat16,
    store: Path | None = None,
    progress: object = None,
    device: str | None = None,
) -> Changes:
    """Rounds every weight of the recipe on the range that `observer` finds; the model is left as it is.

    Args:
        model: Any causal language model.
        recipe: Module name to scheme.
        batches: Not looked at.
        observer: Finds ranges.
        dtype: Storage dtype of the scales.
        store: Not needed: there is nothing worth resuming.
        progress: Likewise.
        device: Where one weight at a time is rounded; None: where the model is.

    Raises:
        ValueError: The recipe does not fit the model, or a weight is not finite; names the module.
    """
    return nearest(model, match(model, recipe).quantized, observer, dtype, device=device)
