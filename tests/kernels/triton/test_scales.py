"""What is served, in Triton; exp is torch's on every number."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from qat.kernels.fake_quant import served_scale, served_zero
from qat.kernels.triton.scales import EXACT, TINY, exp
from qat.kernels.triton.scales import served_scale as scale_triton
from qat.kernels.triton.scales import served_zero as zero_triton
from qat.numerics.grid import IntGrid

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@triton.jit
def _exp(x, y, n, B: tl.constexpr):
    at = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(y + at, exp(tl.load(x + at, mask=at < n, other=0.0)), mask=at < n)


@triton.jit
def _scale(scale, step, out, n, B: tl.constexpr, LEARNED: tl.constexpr, TINY: tl.constexpr):
    at = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(out + at, scale_triton(scale, step, at, at < n, LEARNED, TINY), mask=at < n)


@triton.jit
def _zero(zero, step, out, n, low, high, B: tl.constexpr, SHIFTED: tl.constexpr):
    at = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(out + at, zero_triton(zero, step, at, at < n, low, high, SHIFTED), mask=at < n)


def served(scale, step):
    out, learned = torch.empty(scale.shape, device=scale.device), step is not None
    _scale[(triton.cdiv(scale.numel(), 1024),)](
        scale, step, out, scale.numel(), 1024, learned, TINY[scale.dtype], **EXACT
    )
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter truncates to bf16
def test_a_served_scale_is_the_references(dtype):
    scale = torch.logspace(-7, 4, 3000).to(dtype).to(DEVICE)
    scale[::3] *= -1
    assert torch.equal(served(scale, None), scale.float())
    step = torch.randn(3000, device=DEVICE)
    expected = served_scale(scale, step).float()
    assert torch.allclose(served(scale, step), expected, rtol=1e-6 if dtype is torch.float32 else 2e-3)
    least = served(scale, torch.full_like(step, -90.0))
    assert torch.equal(least, served_scale(scale, torch.full_like(step, -90.0)).float())
    assert torch.equal(least.sign(), scale.float().sign())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_served_zero_point_is_the_references(bits):
    grid = IntGrid(bits)
    zero = torch.randint(grid.qmin, grid.qmax + 1, (2000,), dtype=torch.int8, device=DEVICE)
    for step in (None, torch.randn(2000, device=DEVICE) * 3, torch.randint(-6, 6, (2000,), device=DEVICE) / 2):
        out = torch.empty(2000, device=DEVICE)
        _zero[(2,)](zero, step, out, 2000, float(grid.qmin), float(grid.qmax), 1024, step is not None)
        assert torch.equal(out, served_zero(zero, step, grid).float())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", list(TINY))
def test_a_served_scale_is_the_references_bit_for_bit(dtype):
    scale = torch.logspace(-44, 38, 1 << 20, device="cuda").to(dtype)
    scale = torch.where((scale == 0) | scale.isinf(), torch.ones_like(scale), scale)
    for size in (0.0, 1e-3, 0.3, 5.0, 40.0):
        step = torch.randn(scale.shape, device="cuda") * size
        assert torch.equal(served(scale, step), served_scale(scale, step).float()), size


@pytest.mark.gpu
@pytest.mark.parametrize(("first", "last"), [(0.0, 20.0), (20.0, 3.4e38)], ids=["to_20", "beyond"])
@pytest.mark.parametrize("sign", [0, -(1 << 31)], ids=["positive", "negative"])
def test_exp_is_torchs_on_every_number(first, last, sign):
    """All fp32 numbers of the range: what `EXP_IN_KERNEL` of `kernels/triton/fake_quant.py` rests on."""
    lowest, highest = (int(torch.tensor(v).view(torch.int32)) for v in (first, last))
    for start in range(lowest, highest + 1, 1 << 26):
        pattern = torch.arange(start, min(start + (1 << 26), highest + 1), dtype=torch.int32, device="cuda")
        x = (pattern | sign).view(torch.float32)
        y = torch.empty_like(x)
        _exp[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), 1024, **EXACT)
        different = y.view(torch.int32) != x.exp().view(torch.int32)
        assert not bool(different.any()), f"{int(different.sum())} differ, {float(x[different][0])!r} is one"
