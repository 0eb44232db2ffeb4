"""Fake-quantization in Triton, one pass over x: the twin of `kernels/fake_quant.py`, bit for bit on a GPU.

Its range is `kernels.fake_quant.fused`. Scales stored in fp32, bf16 or fp16 are computed in the kernel; others, and
those over a global scale, which are few, by the reference's own functions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.kernels.fake_quant import served_scale as torch_served_scale
from qat.kernels.triton.levels import kind, snap
from qat.kernels.triton.scales import EXACT, TINY, served_scale, served_zero
from qat.kernels.triton.tiles import WARPS, tiles
from qat.numerics.affine import served
from qat.numerics.grid import Grid

EXP_IN_KERNEL = True  # libdevice's expf is torch's, bit for bit (test_scales.py); False: torch computes it


@triton.jit
def _kernel(  # type: ignore[no-untyped-def]
    x, scale, log_step, zero_point, zero_step, result, s_out, groups, low, high,
    SIZE: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_E: tl.constexpr, PARTS: tl.constexpr,
    GRID: tl.constexpr, TINY: tl.constexpr,
    LEARNED: tl.constexpr, ZERO: tl.constexpr, SHIFTED: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    part = pid % PARTS
    g = (pid // PARTS).to(tl.int64) * BLOCK_G + tl.arange(0, BLOCK_G)
    e = part * BLOCK_E + tl.arange(0, BLOCK_E)
    there = g < groups
    s = served_scale(scale, log_step, g, there, LEARNED, TINY)
    z = s
    if ZERO:
        z = served_zero(zero_point, zero_step, g, there, low, high, SHIFTED)
    if part == 0:
        tl.store(s_out + g, s, mask=there)
    at = g[:, None] * SIZE + e[None, :]
    mask = there[:, None] & (e < SIZE)[None, :]
    wide, zeros = tl.broadcast_to(s[:, None], (BLOCK_G, BLOCK_E)), tl.broadcast_to(z[:, None], (BLOCK_G, BLOCK_E))
    u = tl.div_rn(tl.load(x + at, mask=mask, other=0.0).to(tl.float32), wide)
    value = snap(u, zeros, low, high, GRID, ZERO) * wide
    tl.store(result + at, value.to(result.dtype.element_ty), mask=mask)


def fake_quantize(
    x: Tensor,
    scale: Tensor,
    log_step: Tensor | None,
    zero_point: Tensor | None,
    zero_step: Tensor | None,
    global_scale: Tensor | None,
    grid: Grid,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Shapes, values and the returned pair as `kernels.fake_quant.fake_quantize` has them."""
    if global_scale is not None or scale.dtype not in TINY or not (EXP_IN_KERNEL or log_step is None):
        s = served(torch_served_scale(scale, log_step), global_scale)
        scale, log_step, tiny = s, None, 0
    else:
        tiny = TINY[scale.dtype]
    result = torch.empty(x.shape, dtype=dtype, device=x.device)
    s = torch.empty(scale.shape, dtype=torch.float32, device=x.device)
    if x.numel() == 0:
        return result, s
    groups, size = s.numel(), x.numel() // s.numel()
    cut = tiles(groups, size, whole=False)
    parts = [None if t is None else t.contiguous() for t in (x, scale, log_step, zero_point, zero_step)]
    with torch.cuda.device_of(x):
        _kernel[(cut.programs,)](
            *parts, result, s, groups, float(grid.low), float(grid.high),
            SIZE=size, BLOCK_G=cut.block_g, BLOCK_E=cut.block_e, PARTS=cut.parts,
            GRID=kind(grid), TINY=tiny,
            LEARNED=log_step is not None, ZERO=zero_point is not None, SHIFTED=zero_step is not None,
            num_warps=WARPS, **EXACT,
        )  # fmt: skip
    return result, s
