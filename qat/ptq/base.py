"""What PTQ methods share: which linears of a block they quantize, what they listen to, and what they round plainly."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qat.nn.observers.base import Observer
from qat.numerics.affine import divisor, quantize
from qat.numerics.metrics import sqnr
from qat.numerics.qtensor import QuantizedTensor
from qat.numerics.scheme import Scheme
from qat.surgery.match import Plan
from qat.surgery.prepare import families
from qat.surgery.walk import Block, Changes

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
) -> Changes:
    """Rounds weights to nearest; the model is left as it is.

    Args:
        model: Any model.
        schemes: Name of each linear or embedding to its scheme.
        observer: Finds ranges.
        dtype: Storage dtype of the scales.
        fallback: Why a method that does better elsewhere rounds these to nearest; recorded for each of them.

    Raises:
        ValueError: A weight is not finite; names the module.
    """
    changes, together = Changes(), families(model, schemes)
    for name, scheme in schemes.items():
        start = time.monotonic()
        weight = model.get_parameter(f"{name}.weight").detach().float()
        try:
            g = divisor((model.get_parameter(f"{n}.weight") for n in together[name]), scheme)
            scale, zero_point = observer.qparams(weight, scheme, dtype, g)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        codes = quantize(weight, scale, zero_point, scheme.grid, g)
        tensor = QuantizedTensor(codes, scale, zero_point, scheme, tuple(weight.shape), g)
        changes.tensors[name] = tensor
        row: dict[str, Any] = {"name": name, "sqnr_db": sqnr(weight, tensor.dequantize(torch.float32))}
        row |= {} if fallback is None else {"fallback": fallback}
        changes.layers.append({**row, "seconds": time.monotonic() - start})
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
