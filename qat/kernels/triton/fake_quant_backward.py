"""The gradient of a fake-quantization in Triton: x and its result's gradient are read once, sums over groups included.

With u = x / s, divided as the forward divides, level Q(u), and `inside` by the estimator's mask (`nn/estimators.py`):

    dx    = G inside                                                        bit for bit the reference's
    dlog  = s f sum of G (Q(u) - u inside; Q(u) outside)                    d / d log s, f a factor of the estimator's
    dzero = -s f sum of G outside

Masks are the reference's. Sums are in fp32, in a fixed order, without atomics, and err by

    |dlog - exact|  <=  64 * 2**-24 * s f sum |G (Q(u) - u or Q(u))|        and likewise dzero

since in groups of at most 2**15 elements none passes through more than 64 roundings: a difference, a product, the sums
of a thread and of a tree, and two products.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.kernels.triton.levels import kind, rint, snap
from qat.kernels.triton.scales import served_zero
from qat.kernels.triton.tiles import WARPS, tiles
from qat.numerics.grid import Grid

MASKS = ("all", "rounded", "between")  # (a), (b) and (c) of `nn/estimators.py`


@triton.jit
def _inside(u, z, low, high, outer, MASK: tl.constexpr, GRID: tl.constexpr, ZERO: tl.constexpr):  # type: ignore[no-untyped-def]
    if ZERO:
        low, high = low - z, high - z
    if MASK == "between":
        inside = (u > low) & (u < high)
    elif GRID == "int":
        code = rint(u)
        inside = (code >= low) & (code <= high)
    else:
        inside = (u > low - outer) & (u < high + outer)
    return inside


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    grad, x, s_in, zero_point, zero_step, dx, dlog, dzero, groups, low, high, outer, factor,
    SIZE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr, PARTS: tl.constexpr, CHUNKS: tl.constexpr,
    GRID: tl.constexpr, MASK: tl.constexpr, ZERO: tl.constexpr, SHIFTED: tl.constexpr,
    OF_X: tl.constexpr, OF_SCALE: tl.constexpr, OF_ZERO: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    g = (pid // PARTS).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    there = g < groups
    s = tl.load(s_in + g, mask=there, other=1.0)
    z = s
    if ZERO:
        z = served_zero(zero_point, zero_step, g, there, low, high, SHIFTED)
    wide, zeros = tl.broadcast_to(s[:, None], (BLOCK_G, BLOCK_E)), tl.broadcast_to(z[:, None], (BLOCK_G, BLOCK_E))
    of_scale = tl.zeros((BLOCK_G, BLOCK_E), tl.float32)
    of_zero = tl.zeros((BLOCK_G, BLOCK_E), tl.float32)
    for chunk in range(CHUNKS):
        e = (pid % PARTS + chunk) * BLOCK_E + tl.arange(0, BLOCK_E)  # one of the two is always 0
        at = g[:, None] * SIZE + e[None, :]
        mask = there[:, None] & (e < SIZE)[None, :]
        upper = tl.load(grad + at, mask=mask, other=0.0).to(tl.float32)
        lower = upper
        if MASK != "all":
            u = tl.div_rn(tl.load(x + at, mask=mask, other=0.0).to(tl.float32), wide)
            inside = _inside(u, zeros, low, high, outer, MASK, GRID, ZERO)
            lower = upper * inside.to(tl.float32)  # a product, as the reference has it: -0 and NaN come out alike
            if OF_SCALE:
                level = snap(u, zeros, low, high, GRID, ZERO)
                of_scale += tl.where(inside, level - u, level) * upper
            if OF_ZERO:
                of_zero += tl.where(inside, 0.0, upper)
        if OF_X:
            tl.store(dx + at, lower.to(dx.dtype.element_ty), mask=mask)
    if OF_SCALE:
        tl.store(dlog + g, tl.sum(of_scale, 1) * factor * s, mask=there)
    if OF_ZERO:
        tl.store(dzero + g, -tl.sum(of_zero, 1) * factor * s, mask=there)


def fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    s: Tensor,
    zero_point: Tensor | None,
    zero_step: Tensor | None,
    grid: Grid,
    mask: str,
    factor: float,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, log s and z, those that are `wanted`; an empty tensor for one that is not.

    Args:
        grad: Of the result, x's shape.
        x: What was rounded, `[...]`.
        s: The served scale, fp32.
        zero_point: The observed zero point, int8, of s's shape.
        zero_step: What is learned of it.
        grid: Integers or a small float.
        mask: One of `MASKS`; with `all`, only x can have a gradient.
        factor: f above.
        wanted: Of x, log s and z.
    """
    assert mask in MASKS, mask
    of_x, of_scale, of_zero = wanted
    assert mask != "all" or not (of_scale or of_zero), "straight through, a scale has no gradient"
    dx = torch.empty(x.shape if of_x else 0, dtype=x.dtype, device=x.device)
    dlog, dzero = (torch.empty(s.shape if want else 0, device=x.device) for want in (of_scale, of_zero))
    if x.numel() == 0:
        return dx, dlog, dzero
    groups, size = s.numel(), x.numel() // s.numel()
    cut = tiles(groups, size, whole=of_scale or of_zero)
    parts = [None if t is None else t.contiguous() for t in (grad, x, s, zero_point, zero_step)]
    with torch.cuda.device_of(x):
        _kernel[(cut.programs,)](
            *parts, dx, dlog, dzero, groups, float(grid.low), float(grid.high), grid.outer, factor,
            SIZE=size, BLOCK_G=cut.block_g, BLOCK_E=cut.block_e, PARTS=cut.parts, CHUNKS=cut.chunks,
            GRID=kind(grid), MASK=mask, ZERO=zero_point is not None, SHIFTED=zero_step is not None,
            OF_X=of_x, OF_SCALE=of_scale, OF_ZERO=of_zero, num_warps=WARPS,
        )  # fmt: skip
    return dx, dlog, dzero
