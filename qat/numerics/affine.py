"""The algebra of affine quantization, once, for everything that quantizes (`README.md` beside this file derives it).

    q = clamp(rint(x / s) + z, qmin, qmax)        codes, in fp32, half to even, z an integer added after the rounding
    W_D = round_D(fp32((q - z) * s))              weights, in the dtype D that the caller names

`s` is always the scale *after* its rounding to the dtype in which it is stored: codes are computed from what is served.
A scale of shape S groups a tensor as `x.reshape(*S, -1)`; see `granularity.py`.
"""

import torch
from torch import Tensor

from qat.numerics.grid import IntGrid
from qat.numerics.scheme import Scheme


def group(x: Tensor, scale: Tensor) -> Tensor:
    """View of `x` whose last axis runs over the elements that share an element of `scale`."""
    return x.reshape(*scale.shape, -1)


def scale_dtype(scheme: Scheme, storage: torch.dtype) -> torch.dtype:
    """The dtype in which a scheme's scales are stored, given the storage dtype of the export."""
    return storage if scheme.scale_dtype is None else getattr(torch, scheme.scale_dtype)


def ranges(x: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """Smallest and largest element of every group of `x`, in fp32, each of the scale's shape."""
    grouped = x.detach().float().reshape(*scheme.granularity.scale_shape(tuple(x.shape)), -1)
    return grouped.amin(-1), grouped.amax(-1)


def round_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds positive fp32 scales to `dtype`; one that underflows takes the dtype's smallest positive value."""
    info = torch.finfo(dtype)
    return scale.to(dtype).clamp(min=info.smallest_normal * info.eps)


def qparams(lo: Tensor, hi: Tensor, scheme: Scheme, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point for groups that range from `lo` to `hi` (fp32).

    Symmetric: `s = max(|lo|, |hi|) / ((2**b - 1) / 2)` and no zero point. Asymmetric: the range is widened to hold 0,
    `s = (hi - lo) / (2**b - 1)`, `z = clamp(rint(qmin - lo / s))` with the rounded s. All-zero groups: s = 1, z = 0.

    Args:
        lo: Smallest value of each group.
        hi: Largest value of each group, of the same shape.
        scheme: Grid and symmetry.
        dtype: Storage dtype; a scheme that fixes its own wins.

    Returns:
        The scale in its stored dtype, and the zero point as int8 or None, both of `lo`'s shape.

    Raises:
        ValueError: A range is not finite, or its scale does not fit the dtype.
    """
    grid = scheme.grid
    if scheme.symmetric:
        span, steps = torch.maximum(lo.abs(), hi.abs()), grid.steps / 2
    else:
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
        span, steps = hi - lo, grid.steps
    empty = span == 0
    scale = round_scale(torch.where(empty, torch.ones_like(span), span / steps), scale_dtype(scheme, dtype))
    if not bool(torch.isfinite(scale).all()):
        raise ValueError(
            f"a scale is not finite in {scale.dtype}: the tensor holds inf, NaN or values beyond the dtype"
        )
    if scheme.symmetric:
        return scale, None
    zero_point = torch.round(grid.qmin - lo / scale.float()).clamp(grid.qmin, grid.qmax)
    return scale, torch.where(empty, torch.zeros_like(zero_point), zero_point).to(torch.int8)


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: IntGrid) -> Tensor:
    """Codes of `x` (int8, shape of `x`): `clamp(rint(x / s) + z, qmin, qmax)` in fp32."""
    steps = torch.round(group(x.float(), scale) / scale.float().unsqueeze(-1))
    if zero_point is not None:
        steps = steps + zero_point.float().unsqueeze(-1)
    return steps.clamp(grid.qmin, grid.qmax).to(torch.int8).reshape(x.shape)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Values of codes, rounded once to `dtype`: `round_D(fp32((q - z) * s))`, shape of `codes`."""
    steps = group(codes, scale).float()
    if zero_point is not None:
        steps = steps - zero_point.float().unsqueeze(-1)
    return (steps * scale.float().unsqueeze(-1)).to(dtype).reshape(codes.shape)


def rtn(x: Tensor, scheme: Scheme, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round to nearest on the min-max range: codes, scale (in its stored dtype) and zero point of `x`."""
    scale, zero_point = qparams(*ranges(x, scheme), scheme, dtype)
    return quantize(x, scale, zero_point, scheme.grid), scale, zero_point
