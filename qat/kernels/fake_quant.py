"""Fake-quantization: x -> round_D(level(x / s) * s), the forward of QAT, as one opaque operator.

Shapes: x `[...]`; scale, log_step, zero_point and zero_step of a scale shape that groups x (`numerics/granularity.py`);
global_scale `[1]`; result of x's shape in `dtype`. With rows `[n]` of a matrix x, for a lookup, these alone are
computed, and the result is `[n, I]`. What is served follows from an observed part and a learned one, which is 0 at
the start, so that training begins exactly on what was observed:

    s = round(scale * exp(log_step))  in the scale's dtype, over the global scale where there is one
    z = clamp(rint(zero_point + zero_step), qmin, qmax)

The operator is opaque on purpose: inductor may replace a division by a product with a reciprocal and contract products
and sums, either of which moves codes. `torch.compile` sees one call, and codes cannot move. On a GPU most calls are one
Triton kernel (`fused` says which), with the same bits.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from importlib.util import find_spec
from typing import TypeVar

import torch
from torch import Tensor

from qat.numerics.affine import group, round_scale, served
from qat.numerics.grid import Codebook, FloatGrid, Grid, IntGrid
from qat.numerics.levels import snap

Watcher = Callable[[Tensor, Tensor, Tensor | None], None]  # scale, result, rows
_watcher: Watcher | None = None
Part = TypeVar("Part", Tensor, Tensor | None)


def served_scale(scale: Tensor, log_step: Tensor | None) -> Tensor:
    """The scale that is stored, in its dtype: `round(scale * exp(log_step))`, never 0."""
    return round_scale(scale.float() if log_step is None else scale.float() * log_step.float().exp(), scale.dtype)


def served_zero(zero_point: Tensor, zero_step: Tensor | None, grid: IntGrid) -> Tensor:
    """The zero point that is stored, int8: `clamp(rint(zero_point + zero_step), qmin, qmax)`."""
    if zero_step is None:
        return zero_point
    return torch.round(zero_point.float() + zero_step).clamp_(grid.qmin, grid.qmax).to(torch.int8)


def taken(values: Part, rows: Tensor | None) -> Part:
    """Rows of a matrix, or of the values that belong to its rows; a value for the whole matrix is every row's."""
    return values if values is None or rows is None or values.dim() < 2 else values.index_select(0, rows)


@lru_cache(maxsize=64)
def grid_of(name: str) -> Grid:
    """The grid of which `name` is the `str`: an operator's arguments are plain values."""
    if name.startswith("int"):
        return IntGrid(int(name[3:]))
    return FloatGrid(name) if name in ("e4m3", "e2m1") else Codebook(name)


@lru_cache(maxsize=1)
def _has_triton() -> bool:
    return find_spec("triton") is not None


def fused(kind: str, dtype: torch.dtype, grid: Grid, ramp: bool) -> bool:
    """Whether Triton computes it: on CUDA, from fp32, bf16 or fp16, to integers or small floats, all of the way.

    Args:
        kind: Of device.
        dtype: Of what is rounded.
        grid: Its levels; codebooks stay with torch.
        ramp: Whether the result goes only some of the way.
    """
    narrow = dtype in (torch.float32, torch.bfloat16, torch.float16)
    return kind == "cuda" and narrow and isinstance(grid, IntGrid | FloatGrid) and not ramp and _has_triton()


def fake_quantize_reference(
    x: Tensor,
    scale: Tensor,
    log_step: Tensor | None,
    zero_point: Tensor | None,
    zero_step: Tensor | None,
    global_scale: Tensor | None,
    grid: Grid,
    strength: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """What the operator computes, in plain torch, of all rows; see `fake_quantize`."""
    s = served(served_scale(scale, log_step), global_scale)
    z = None
    if zero_point is not None:
        assert isinstance(grid, IntGrid)
        z = served_zero(zero_point, zero_step, grid).float().unsqueeze(-1)
    values = snap(group(x.float(), scale) / s.unsqueeze(-1), grid, z).mul_(s.unsqueeze(-1))
    if strength is not None:
        values = torch.lerp(group(x.float(), scale), values, float(strength))
    return values.to(dtype).reshape(x.shape).contiguous(), s.contiguous()


@torch.library.custom_op("qat::fake_quantize", mutates_args=())
def _fake_quantize(
    x: Tensor,
    scale: Tensor,
    log_step: Tensor | None,
    zero_point: Tensor | None,
    zero_step: Tensor | None,
    global_scale: Tensor | None,
    grid: str,
    strength: Tensor | None,
    dtype: torch.dtype,
    rows: Tensor | None,
) -> tuple[Tensor, Tensor]:
    levels, watched = grid_of(grid), scale
    x, scale, log_step = taken(x, rows), taken(scale, rows), taken(log_step, rows)
    zero_point, zero_step = taken(zero_point, rows), taken(zero_step, rows)
    if fused(x.device.type, x.dtype, levels, strength is not None):
        from qat.kernels.triton.fake_quant import fake_quantize as twin

        result, s = twin(x, scale, log_step, zero_point, zero_step, global_scale, levels, dtype)
    else:
        result, s = fake_quantize_reference(
            x, scale, log_step, zero_point, zero_step, global_scale, levels, strength, dtype
        )
    show(watched, result, rows)
    return result, s


@_fake_quantize.register_fake
def _(x, scale, log_step, zero_point, zero_step, global_scale, grid, strength, dtype, rows):  # type: ignore[no-untyped-def]
    x, scale = taken(x, rows), taken(scale, rows)
    return x.new_empty(x.shape, dtype=dtype), scale.new_empty(scale.shape, dtype=torch.float32)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    grid: Grid,
    dtype: torch.dtype,
    *,
    log_step: Tensor | None = None,
    zero_point: Tensor | None = None,
    zero_step: Tensor | None = None,
    global_scale: Tensor | None = None,
    strength: Tensor | None = None,
    rows: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Equal, bit for bit, to `dequantize(quantize(x))` of `numerics/affine.py` with what is served.

    With a `strength`, a number from 0 to 1, the result is only that far on its way from x: `x + strength (Q(x) - x)`.
    It is a tensor of no dimensions on the CPU: `torch.compile` would compile anew for each float.

    Returns:
        The result, and the served scale in fp32, which the gradient needs; both of `rows` alone, where they are given.
    """
    return _fake_quantize(x, scale, log_step, zero_point, zero_step, global_scale, str(grid), strength, dtype, rows)


def show(scale: Tensor, result: Tensor, rows: Tensor | None) -> None:
    """Shows a fake-quantization that really ran to the watcher, if there is one."""
    if _watcher is not None:
        _watcher(scale, result, rows)


@contextmanager
def watch(watcher: Watcher) -> Iterator[None]:
    """While open, `watcher(scale, result, rows)` sees every fake-quantization as it really ran, compiled or not.

    `scale` tells which one it is: the observed part is a buffer that stays where it is, while x may be a sum made for
    the occasion.

    A module hook would not do: a compiled graph does not call hooks that were added after its compilation.
    """
    global _watcher
    assert _watcher is None, "fake-quantization is watched by one at a time"
    _watcher = watcher
    try:
        yield
    finally:
        _watcher = None
