"""Fake-quantization: x -> round_D((q(x) - z) * s), the forward of QAT, as one opaque operator.

Shapes: x `[...]`; scale, log_step and zero_point of a scale shape that groups x (`numerics/granularity.py`); result of
x's shape in `dtype`. The served scale is `s = round(scale * exp(log_step))` in `scale_dtype`: `log_step` is the learned
part, 0 at the start, so that training begins exactly on the observed scale.

The operator is opaque on purpose: inductor may replace a division by a product with a reciprocal and contract products
and sums, either of which moves codes. `torch.compile` sees one call, and codes cannot move.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from qat.numerics.affine import group, round_scale

_watcher: Callable[[Tensor, Tensor], None] | None = None


def served_scale(scale: Tensor, log_step: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The scale that is stored and served, in `dtype`: `round_dtype(scale * exp(log_step))`, never 0."""
    return round_scale(scale.float() if log_step is None else scale.float() * log_step.float().exp(), dtype)


@torch.library.custom_op("qat::fake_quantize", mutates_args=())
def fake_quantize(
    x: Tensor,
    scale: Tensor,
    log_step: Tensor | None,
    zero_point: Tensor | None,
    qmin: int,
    qmax: int,
    scale_dtype: torch.dtype,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Equal, bit for bit, to `dequantize(quantize(x))` of `numerics/affine.py` with the served scale.

    Returns:
        The result, and the served scale in fp32, which the gradient needs.
    """
    served = served_scale(scale, log_step, scale_dtype).float()
    s = served.unsqueeze(-1)
    steps = (group(x.float(), scale) / s).round_()
    if zero_point is None:
        steps.clamp_(qmin, qmax).add_(0.0)  # -0 becomes +0, as an integer code has it
    else:
        z = zero_point.float().unsqueeze(-1)
        steps.add_(z).clamp_(qmin, qmax).sub_(z)
    result = steps.mul_(s).to(dtype).reshape(x.shape)
    if _watcher is not None:
        _watcher(x, result)
    return result, served


@fake_quantize.register_fake
def _(x, scale, log_step, zero_point, qmin, qmax, scale_dtype, dtype):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, dtype=dtype), torch.empty_like(scale, dtype=torch.float32)


@contextmanager
def watch(watcher: Callable[[Tensor, Tensor], None]) -> Iterator[None]:
    """While open, `watcher(x, result)` sees every fake-quantization as it really ran, compiled or not.

    A module hook would not do: a compiled graph does not call hooks that were added after its compilation.
    """
    global _watcher
    assert _watcher is None, "fake-quantization is watched by one at a time"
    _watcher = watcher
    try:
        yield
    finally:
        _watcher = None
