"""The precision in which a graph and the engine are compared: fp32, or fp64 where its noise would hide a difference.

Two correct computations in fp32 differ in their last bits. Where keys and values, or the inputs of linears, are rounded
to a grid as they come, a last bit now and then decides between two codes; what then differs is a whole step, and it
decides about more codes further on. Measured on SmolLM2-135M: logits of one and the same graph, computed token by token
and at once, differ by 2e-6 of the largest without a quantized cache, and by 1e-2 with int8. In fp64 no code changes
sides, and they differ by 3e-15. Weights of 2 bits, rounded to nearest, leave a model (KL 10) in which last bits grow:
logits of two correct loaders differ by 1e-4 of the largest in fp32, at 3 bits by 5e-6. So a graph with a quantized
cache, quantized inputs or weights of 2 bits is compared in fp64: what is computed is the same, only the rounding noise
that hides it is gone.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from qat.numerics.recipe import Recipe
from qat.numerics.scheme import integers

FEW = 2  # bits of a weight, as files hold them


def compared_in(recipe: Recipe) -> torch.dtype:
    """The precision in which an export of this recipe is compared; the same for a recipe as a file says it."""
    rules = recipe.rules.values()
    rounds = recipe.kv is not None or any(rule.input is not None for rule in rules)
    few = any(rule.weight is not None and integers(rule.weight).grid.bits <= FEW for rule in rules)
    return torch.float64 if rounds or few else torch.float32


@contextmanager
def computing(dtype: torch.dtype) -> Iterator[None]:
    """A Hugging Face graph with fp32 parameters computes in `dtype`, fp32 or fp64: no autocast, no TF32.

    In fp64 every embedding, linear and widening to fp32 widens to fp64 instead; parameters are widened as they are
    used. What happens inside of this project's opaque operators stays as it is: their fp32 is their definition.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            if dtype == torch.float64:
                with _Double():
                    yield
            else:
                yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Double(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.float:
            return args[0].double()
        if func is torch.Tensor.to:
            args, kwargs = [_wide(a) for a in args], {key: _wide(value) for key, value in kwargs.items()}
        if func is F.linear:
            args, kwargs = [_double(a) for a in args], {key: _double(value) for key, value in kwargs.items()}
        out = func(*args, **kwargs)
        return _double(out) if func is F.embedding else out


def _wide(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument


def _double(argument: Any) -> Any:
    return argument.double() if isinstance(argument, Tensor) and argument.is_floating_point() else argument
