"""What PTQ methods share: which linears of a block they quantize, and what they listen to."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from qat.numerics.scheme import Scheme
from qat.surgery.match import Plan
from qat.surgery.walk import Block


def targets(block: Block, plan: Plan) -> dict[str, Scheme]:
    """Quantized linears of a block by their name in it.

    Raises:
        ValueError: The plan quantizes inputs, which weight-only methods do not see.
    """
    found = {}
    for row in plan.rows:
        if row.weight is not None and row.name.startswith(f"{block.name}."):
            if row.input is not None:
                raise ValueError(f"{row.name}: this method quantizes weights only; its rule also has an input scheme")
            found[row.name.removeprefix(f"{block.name}.")] = row.weight
    return found


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
