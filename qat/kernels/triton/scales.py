"""Twin, inside Triton kernels, of what `kernels/fake_quant.py` serves: scales and zero points, bit for bit."""

import torch
import triton
import triton.language as tl
from triton.language.extra import libdevice

from qat.kernels.triton.levels import bits_of, rint

INTERPRETED = triton.knobs.runtime.interpret
_INTERPRETED: tl.constexpr = tl.constexpr(INTERPRETED)
# The bit pattern, in fp32, of the smallest positive number of each dtype that scales are rounded to inside a kernel.
TINY = {torch.float32: 1, torch.bfloat16: 1 << 16, torch.float16: 103 << 23}
# Nothing is fused, and subnormals are kept: both would move a last bit. The interpreter knows no such options.
EXACT = {} if INTERPRETED else {"enable_fp_fusion": False, "enable_reflect_ftz": False}


@triton.jit
def exp(x):  # type: ignore[no-untyped-def]
    """CUDA's `expf`, which is torch's; `tl.exp` is an approximation."""
    if _INTERPRETED:
        y = tl.exp(x)
    else:
        y = libdevice.exp(x)
    return y


@triton.jit
def at_least(s, TINY: tl.constexpr):  # type: ignore[no-untyped-def]
    """Numbers of at least this magnitude, given as a bit pattern; signs and NaN stay."""
    bits = bits_of(s)
    size = bits & 0x7FFFFFFF
    return tl.where((s == s) & (size < TINY), TINY | (bits ^ size), bits).to(tl.float32, bitcast=True)


@triton.jit
def served_scale(scale, log_step, at, mask, LEARNED: tl.constexpr, TINY: tl.constexpr):  # type: ignore[no-untyped-def]
    """`round(scale * exp(log_step))` in the dtype of `scale`, of the scales at `at`, as fp32."""
    stored = tl.load(scale + at, mask=mask, other=1.0)
    s = stored.to(tl.float32)
    if LEARNED:
        s = (s * exp(tl.load(log_step + at, mask=mask, other=0.0))).to(stored.dtype).to(tl.float32)
    return at_least(s, TINY)


@triton.jit
def served_zero(zero_point, zero_step, at, mask, low, high, SHIFTED: tl.constexpr):  # type: ignore[no-untyped-def]
    """`clamp(rint(zero_point + zero_step), qmin, qmax)` of the zero points at `at`, as fp32."""
    z = tl.load(zero_point + at, mask=mask, other=0).to(tl.float32)
    if SHIFTED:
        z = rint(z + tl.load(zero_step + at, mask=mask, other=0.0))
        z = tl.where(z < low, low, tl.where(z > high, high, z)).to(tl.int8).to(tl.float32)
    return z
