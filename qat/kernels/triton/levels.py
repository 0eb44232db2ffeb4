"""Twin of `numerics/levels.py` inside Triton kernels: the nearest level, bit for bit, for integers and small floats."""

import triton
import triton.language as tl

from qat.numerics.grid import Codebook, Grid, IntGrid


@triton.jit
def rint(u):  # type: ignore[no-untyped-def]
    """The nearest integer, half to even, where |u| <= 2**22; further out, some number beyond 2**21. Never -0."""
    return (u + 12582912.0) - 12582912.0  # 1.5 * 2**23: floats of that size are the integers


@triton.jit
def bits_of(u):  # type: ignore[no-untyped-def]
    """The bit pattern of an fp32 number."""
    return u.to(tl.int32, bitcast=True)


@triton.jit
def snap(u, z, low, high, GRID: tl.constexpr, ZERO: tl.constexpr):  # type: ignore[no-untyped-def]
    """The level nearest to u, saturating at low and high, which a zero point z shifts if ZERO.

    Comparisons let NaN through, as `clamp` does.
    """
    if GRID == "e2m1" or GRID == "e4m3":
        inside = tl.where(u < low, low, tl.where(u > high, high, u))
        size = tl.abs(inside)
        if GRID == "e2m1":
            step = tl.where(size < 2.0, 0.5, tl.where(size < 4.0, 1.0, 2.0))
        else:  # three bits below the leading one, whose place is at least -6
            place = tl.maximum(bits_of(size) & 0x7F800000, 121 << 23)
            step = (place - (3 << 23)).to(tl.float32, bitcast=True)
        far = step * 12582912.0  # floats of that size are the multiples of the step
        rounded = bits_of((size + far) - far) | (bits_of(inside) & -2147483648)  # with the sign, of a zero too
        level = rounded.to(tl.float32, bitcast=True)
    else:
        level = rint(u)
        if ZERO:
            level = level + z
        level = tl.where(level < low, low, tl.where(level > high, high, level))
        if ZERO:
            level = level - z
    return level


def kind(grid: Grid) -> str:
    """What `snap` calls a grid: integers of all widths are one kernel."""
    assert not isinstance(grid, Codebook), f"{grid}: a codebook is looked up, not rounded to"
    return "int" if isinstance(grid, IntGrid) else str(grid)
