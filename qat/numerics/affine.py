"""The algebra of quantization, once, for everything that quantizes (`README.md` beside this file derives it).

    q = clamp(rint(x / s) + z, qmin, qmax)        codes, in fp32, half to even, z an integer added after the rounding
    W_D = round_D(fp32((q - z) * s))              weights, in the dtype D that the caller names

and, on grids that are not integers, the nearest level to x / s in place of q - z (`levels.py`). `s` is always the scale
*after* its rounding to the dtype in which it is stored: codes are computed from what is served. Two-level schemes have
s = s_b / g, with s_b in e4m3 and one fp32 divisor g. A scale of shape S groups a tensor as `x.reshape(*S, -1)`; see
`granularity.py`.
"""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from qat.numerics.grid import FloatGrid, Grid, IntGrid
from qat.numerics.levels import decode, encode, snap
from qat.numerics.scheme import E8M0, Scheme

INTEGERS = IntGrid(8)  # what decodes integer codes of any width


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


def shrunken(lo: Tensor, hi: Tensor, factors: Iterable[float], scheme: Scheme) -> Iterator[tuple[Tensor, Tensor]]:
    """Ranges to choose from: `lo` to `hi` times each factor and, where scales have signs, the same ones mirrored.

    A range with ends of one length is its own mirror, and its scale positive.
    """
    for factor in factors:
        low, high = lo * factor, hi * factor
        yield low, high
        if scheme.convention == "signed":
            yield -high, -low


def round_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Rounds fp32 scales to `dtype`; one that underflows takes the dtype's smallest magnitude, with its sign.

    Narrow dtypes have positive scales alone: e4m3 saturates at 448, e8m0 takes the power of two that is nearest on a
    logarithmic axis.
    """
    if dtype == torch.float8_e4m3fn:
        return scale.clamp(2.0**-9, 448.0).to(dtype)
    if dtype == torch.float8_e8m0fnu:
        bits = scale.clamp(2.0**-126, 2.0**127).view(torch.int32) + 0x004AFB0D  # carries from sqrt(2) on
        return (bits & 0x7F800000).view(torch.float32).to(dtype)
    info, rounded = torch.finfo(dtype), scale.to(dtype)
    return rounded.abs().clamp_(min=info.smallest_normal * info.eps).copysign_(rounded)


def served(scale: Tensor, global_scale: Tensor | None) -> Tensor:
    """The scale that multiplies levels, in fp32: `s`, or `s_b / g`."""
    return scale.float() if global_scale is None else scale.float() / global_scale


def divisor(tensors: Iterable[Tensor], scheme: Scheme) -> Tensor | None:
    """The divisor g of a two-level scheme, fp32 `[1]`; None for other schemes.

    `g = 448 * high / amax` over all of `tensors`, which share it; 1 where all are zero.

    Raises:
        ValueError: A tensor is not finite.
    """
    if not scheme.two_level:
        return None
    amax = torch.stack([x.detach().float().abs().amax() for x in tensors]).amax().reshape(1)
    if not bool(torch.isfinite(amax).all()):
        raise ValueError("a global scale is not finite: the tensor holds inf or NaN")
    g = 448.0 * scheme.grid.high / amax
    return torch.where(amax == 0, torch.ones_like(g), g.clamp(max=torch.finfo(torch.float32).max))


def qparams(
    lo: Tensor, hi: Tensor, scheme: Scheme, dtype: torch.dtype, g: Tensor | None = None, check: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Scale and zero point for groups that range from `lo` to `hi` (fp32).

    Symmetric: `s = max(|lo|, |hi|) / reach` and no zero point; by the signed convention over `2**(b-1)`, and negative
    where `hi` is the longer end, so that a mirrored range has the other sign, if one end is longer. Asymmetric: the
    range is widened to hold 0, `s = (hi - lo) / (2**b - 1)`, `z = clamp(rint(qmin - lo / s))` with the rounded s.
    Two-level: `s_b = g absmax / high`. Powers of two: `2**(floor(log2(absmax')) - exponent)` where magnitudes
    from 1.75 * 2**k on count as 2**(k+1), as in compressed-tensors. All-zero groups: s = 1, z = 0.

    Args:
        lo: Smallest value of each group.
        hi: Largest value of each group, of the same shape.
        scheme: Grid and symmetry.
        dtype: Storage dtype; a scheme that fixes its own wins.
        g: Divisor of a two-level scheme.
        check: Whether to look for what is not finite, which makes a GPU's host wait.

    Returns:
        The scale in its stored dtype, and the zero point as int8 or None, both of `lo`'s shape.

    Raises:
        ValueError: A range is not finite, or its scale does not fit the dtype.
    """
    assert (g is not None) == scheme.two_level, "a divisor goes with two-level schemes, and with no others"
    grid, stored = scheme.grid, scale_dtype(scheme, dtype)
    if scheme.symmetric:
        span = torch.maximum(lo.abs(), hi.abs())
    else:
        lo, hi = lo.clamp(max=0), hi.clamp(min=0)
        span = hi - lo
    empty = span == 0
    scale = round_scale(torch.where(empty, torch.ones_like(span), _scale(span, scheme, g)), stored)
    # Narrow dtypes saturate, so what does not fit them is seen in the range; wide ones show it in the scale.
    if check and not bool(torch.isfinite(span if stored.itemsize == 1 else scale).all()):
        raise ValueError(f"a scale is not finite in {stored}: the tensor holds inf, NaN or values beyond the dtype")
    if scheme.symmetric:
        return torch.where(hi > -lo, -scale, scale) if scheme.convention == "signed" else scale, None
    assert isinstance(grid, IntGrid)
    zero_point = torch.round(grid.qmin - lo / scale.float()).clamp(grid.qmin, grid.qmax)
    return scale, torch.where(empty, torch.zeros_like(zero_point), zero_point).to(torch.int8)


def _scale(span: Tensor, scheme: Scheme, g: Tensor | None) -> Tensor:
    grid = scheme.grid
    if scheme.scale_dtype == E8M0:
        assert isinstance(grid, FloatGrid)
        power = ((span.view(torch.int32) + (1 << 21)) & 0x7F800000).view(torch.float32)
        return power * 2.0**-grid.exponent
    if g is not None:
        return _over(g * span, grid.high)
    if isinstance(grid, IntGrid) and not scheme.symmetric:
        return _over(span, grid.steps)
    return _over(span, {"ct": grid.reach, "vllm": grid.high, "signed": -grid.low}[scheme.convention])


def _over(span: Tensor, number: float) -> Tensor:
    """A true division: by a plain number a GPU multiplies with its reciprocal, and fp32 scales differ in a last bit."""
    return span / torch.full_like(span, number)


def quantize(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, grid: Grid, global_scale: Tensor | None = None
) -> Tensor:
    """Codes of `x` (shape of `x`): the nearest levels to `x / s`, in fp32."""
    z = None if zero_point is None else zero_point.float().unsqueeze(-1)
    u = group(x.float(), scale) / served(scale, global_scale).unsqueeze(-1)
    return encode(snap(u, grid, z), grid, z).reshape(x.shape)


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    dtype: torch.dtype,
    grid: Grid | None = None,
    global_scale: Tensor | None = None,
) -> Tensor:
    """Values of codes, rounded once to `dtype`: `round_D(fp32(level * s))`, shape of `codes`.

    Without a grid codes are integers: `round_D(fp32((q - z) * s))`.
    """
    z = None if zero_point is None else zero_point.float().unsqueeze(-1)
    levels = decode(group(codes, scale), grid or INTEGERS, z)
    return (levels * served(scale, global_scale).unsqueeze(-1)).to(dtype).reshape(codes.shape)


def rtn(x: Tensor, scheme: Scheme, dtype: torch.dtype, g: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Round to nearest on the min-max range: codes, scale (in its stored dtype) and zero point of `x`."""
    scale, zero_point = qparams(*ranges(x, scheme), scheme, dtype, g)
    return quantize(x, scale, zero_point, scheme.grid, g), scale, zero_point
