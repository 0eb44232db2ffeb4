"""What PTQ methods share: which linears of a block they quantize, what they listen to, what they round plainly.

And how a method that moves a model's tensors, its function kept, ends with another one that rounds them: `onwards`.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat.nn.observers.base import Observer
from qat.numerics.affine import divisor, quantize
from qat.numerics.metrics import sqnr
from qat.numerics.qtensor import QuantizedTensor
from qat.numerics.recipe import Recipe
from qat.numerics.scheme import Scheme
from qat.surgery.convert import apply
from qat.surgery.match import Plan, match
from qat.surgery.prepare import families
from qat.surgery.walk import Block, Changes

Method = Callable[..., Changes]  # (model, recipe, batches, *, ..., dtype, store, progress)
OUTSIDE = "outside of the decoder blocks, where the method does not work"


def targets(block: Block, plan: Plan) -> dict[str, Scheme]:
    """Quantized linears of a block by their name in it; what their rules say of inputs does not touch their weights."""
    prefix = f"{block.name}."
    return {
        row.name.removeprefix(prefix): row.weight
        for row in plan.rows
        if row.weight is not None and row.name.startswith(prefix)
    }


def outside(plan: Plan, blocks: str) -> dict[str, Scheme]:
    """What the plan quantizes outside of the decoder blocks, where no walk comes: an embedding, an untied head."""
    return {name: scheme for name, scheme in plan.quantized.items() if not name.startswith(f"{blocks}.")}


@torch.no_grad()
def nearest(
    model: nn.Module,
    schemes: Mapping[str, Scheme],
    observer: Observer,
    dtype: torch.dtype,
    fallback: str | None = None,
    device: torch.device | str | None = None,
) -> Changes:
    """Rounds weights to nearest; the model is left as it is.

    Args:
        model: Any model.
        schemes: Name of each linear or embedding to its scheme.
        observer: Finds ranges.
        dtype: Storage dtype of the scales.
        fallback: Why a method that does better elsewhere rounds these to nearest; recorded for each of them.
        device: Where one weight at a time is rounded; None: where it is.

    Raises:
        ValueError: A weight is not finite; names the module.
    """
    changes, together = Changes(), families(model, schemes)
    for name, scheme in schemes.items():
        start = time.monotonic()
        stored = model.get_parameter(f"{name}.weight").detach()
        weight = stored.to(device or stored.device).float()
        try:
            g = divisor((model.get_parameter(f"{n}.weight") for n in together[name]), scheme)
            g = None if g is None else g.to(weight.device)
            scale, zero_point = observer.qparams(weight, scheme, dtype, g)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        codes = quantize(weight, scale, zero_point, scheme.grid, g)
        tensor = QuantizedTensor(codes, scale, zero_point, scheme, tuple(weight.shape), g)
        changes.tensors[name] = tensor.to(stored.device)
        row: dict[str, Any] = {"name": name, "sqnr_db": sqnr(weight, tensor.dequantize(torch.float32))}
        row |= {} if fallback is None else {"fallback": fallback}
        changes.layers.append({**row, "seconds": time.monotonic() - start})
    return changes


@torch.no_grad()
def onwards(
    model: PreTrainedModel,
    recipe: Recipe,
    batches: list[Tensor],
    moved: Mapping[str, Tensor],
    then: Method | None,
    observer: Observer,
    dtype: torch.dtype,
    store: Path | None,
    progress: Callable[[int, int], None] | None,
) -> Changes:
    """Rounds a model whose function somebody kept while moving its tensors: what SmoothQuant and rotations end with.

    Args:
        model: The model as it was; left as it is.
        recipe: Module name to scheme.
        batches: Calibration token ids.
        moved: Parameter name to changed tensor. What the recipe leaves unquantized is rounded to the storage dtype;
            what it quantizes, to nothing narrower than the model's own dtype.
        then: The method that rounds; None: to nearest.
        observer: Finds the ranges of the latter.
        dtype: Storage dtype.
        store: `then` keeps what it keeps in a folder below it.
        progress: For `then`.

    Returns:
        What the method found; `folded` holds what was moved and is not quantized, too.
    """
    quantized = match(model, recipe).quantized
    folded = {name: value.to(dtype) for name, value in moved.items() if name.removesuffix(".weight") not in quantized}
    seen = apply(model, {}, {**moved, **folded})
    if then is None:
        found = nearest(seen, quantized, observer, dtype)
    else:
        below = None if store is None else store / "then"
        found = then(seen, recipe, batches, dtype=dtype, store=below, progress=progress)
    assert found.tensors.keys() == quantized.keys(), "a method rounds what the recipe quantizes, all of it"
    changes = Changes(folded=folded)
    changes.add(found)
    return changes


@contextmanager
def listening(module: nn.Module, listener: Callable[[tuple[Any, ...], dict[str, Any]], None]) -> Iterator[None]:
    """While open, `listener(args, kwargs)` sees every call of `module`."""
    handle = module.register_forward_pre_hook(lambda _, args, kwargs: listener(args, kwargs), with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def rows(x: Tensor) -> Tensor:
    """Activations as a matrix of tokens: `[..., I] -> [T, I]`."""
    return x.reshape(-1, x.shape[-1])
