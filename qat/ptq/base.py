"""What PTQ methods share: which linears of a block they quantize, and what they listen to."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from qat.numerics.scheme import Scheme
from qat.surgery.match import Plan
from qat.surgery.walk import Block


def targets(block: Block, plan: Plan) -> dict[str, Scheme]:
    """Quantized linears of a block by their name in it; what their rules say of inputs does not touch their weights."""
    prefix = f"{block.name}."
    return {
        row.name.removeprefix(prefix): row.weight
        for row in plan.rows
        if row.weight is not None and row.name.startswith(prefix)
    }


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
