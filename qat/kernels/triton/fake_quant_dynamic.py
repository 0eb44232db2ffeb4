"""Fake-quantization on a scale that the tensor itself gives, in Triton: range, scale and rounding in one pass over x.

The twin of min-max ranges (`numerics/affine.py`), bit for bit on a GPU, for symmetric schemes whose groups lie side by
side: tokens, or groups of a token. A program holds its groups in registers and reads x once.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.kernels.triton.levels import bits_of, kind, snap
from qat.kernels.triton.scales import EXACT, at_least
from qat.kernels.triton.tiles import TILE
from qat.numerics.grid import FloatGrid
from qat.numerics.scheme import E4M3, E8M0, Scheme


@triton.jit
def _scale(bits, g, SCALE: tl.constexpr, REACH: tl.constexpr, SHIFT: tl.constexpr, BLOCK_G: tl.constexpr):  # type: ignore[no-untyped-def]
    """The served scale of groups, from the bit pattern of their largest magnitude."""
    span = bits.to(tl.float32, bitcast=True)
    if SCALE == "power":  # 1.75 * 2**k and more count as 2**(k + 1); SHIFT is 2**-exponent
        power = ((bits + (1 << 21)) & 0x7F800000).to(tl.float32, bitcast=True) * SHIFT
        s = tl.where(power < 2.0**-126, 2.0**-126, tl.where(power > 2.0**127, 2.0**127, power))
    elif SCALE == "two_level":
        raw = tl.div_rn(g * span, tl.full((BLOCK_G,), REACH, tl.float32))
        s = snap(tl.where(raw < 2.0**-9, 2.0**-9, raw), raw, -448.0, 448.0, "e4m3", False)
    else:
        s = at_least(tl.div_rn(span, tl.full((BLOCK_G,), REACH, tl.float32)), 1)
    s = tl.where(bits == 0, 1.0, s)
    if SCALE == "two_level":
        s = tl.div_rn(s, tl.zeros((BLOCK_G,), tl.float32) + g)
    return s


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    x, global_scale, result, s_out, groups, low, high,
    SIZE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr,
    GRID: tl.constexpr, SCALE: tl.constexpr, REACH: tl.constexpr, SHIFT: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    e = tl.arange(0, BLOCK_E)
    at = n[:, None] * SIZE + e[None, :]
    mask = (n < groups)[:, None] & (e < SIZE)[None, :]
    values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32)
    largest = tl.max(bits_of(values) & 0x7FFFFFFF, 1)  # magnitudes are ordered as their patterns are, NaN on top
    g = 1.0
    if SCALE == "two_level":
        g = tl.load(global_scale)
    s = _scale(largest, g, SCALE, REACH, SHIFT, BLOCK_G)
    tl.store(s_out + n, s, mask=n < groups)
    wide = tl.broadcast_to(s[:, None], (BLOCK_G, BLOCK_E))
    level = snap(tl.div_rn(values, wide), wide, low, high, GRID, False)
    tl.store(result + at, (level * wide).to(result.dtype.element_ty), mask=mask)


def fake_quantize_dynamic(
    x: Tensor, global_scale: Tensor | None, scheme: Scheme, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """`x` `[..., I]` on the grid of a dynamic scheme, in `dtype`, and the served scales, fp32 of the scale's shape."""
    grid = scheme.grid
    result = torch.empty(x.shape, dtype=dtype, device=x.device)
    s = torch.empty(scheme.granularity.scale_shape(tuple(x.shape)), device=x.device)
    if x.numel() == 0:
        return result, s
    groups, size = s.numel(), x.numel() // s.numel()
    block_e = triton.next_power_of_2(size)
    block_g = min(max(TILE // block_e, 1), triton.next_power_of_2(groups))
    shift = 2.0**-grid.exponent if isinstance(grid, FloatGrid) else 1.0
    half_way = scheme.convention == "ct" and not scheme.two_level
    with torch.cuda.device_of(x):
        _kernel[(triton.cdiv(groups, block_g),)](
            x.contiguous(), global_scale, result, s, groups, float(grid.low), float(grid.high),
            SIZE=size, BLOCK_G=block_g, BLOCK_E=block_e, GRID=kind(grid),
            SCALE={E8M0: "power", E4M3: "two_level"}.get(scheme.scale_dtype or "", "plain"),
            REACH=float(grid.reach if half_way else grid.high), SHIFT=shift,
            num_warps=min(max(block_g * block_e // 512, 4), 16), **EXACT,
        )  # fmt: skip
    return result, s
