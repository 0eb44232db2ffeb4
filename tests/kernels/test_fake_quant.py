"""Law (b): fake-quantization equals dequantize(quantize(w)) bit for bit; eager equals compiled."""

import shutil

import pytest
import torch
from tiny import scheme

from qat.kernels.fake_quant import fake_quantize, served_scale, watch
from qat.numerics.affine import dequantize, quantize, rtn
from qat.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from qat.numerics.grid import IntGrid
from qat.numerics.scheme import Scheme

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = 1000


def bits(x):
    return x.view({4: torch.int32, 2: torch.int16}[x.element_size()])


def op(x, scale, zero, grid, dtype, step=None):
    return fake_quantize(x, scale, step, zero, grid.qmin, grid.qmax, scale.dtype, dtype)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(16), PerToken()], ids=str)
def test_law_b_over_a_thousand_seeds(granularity, symmetric, dtype):
    """A thousand random matrices, stacked, of widely different sizes; every width; three storage dtypes."""
    rows = 4
    x = torch.cat([
        torch.randn(rows, 32, generator=torch.Generator().manual_seed(seed)) * 10 ** (seed % 9 - 6)
        for seed in range(SEEDS)
    ])  # fmt: skip
    x[::97] = 0
    for width in (2, 3, 4, 5, 6, 7, 8):
        s = Scheme(IntGrid(width), granularity, symmetric, dynamic=isinstance(granularity, PerToken))
        for storage in DTYPES if width in (3, 4, 8) else (torch.bfloat16,):
            codes, scale, zero = rtn(x, s, storage)
            expected = dequantize(codes, scale, zero, dtype)
            assert torch.equal(bits(op(x, scale, zero, s.grid, dtype)), bits(expected)), (width, storage)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compiled_equals_eager(backend, symmetric):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    s = scheme(4, 32, symmetric)
    x, step = torch.randn(128, 64), torch.randn(128, 2) * 0.3
    _, scale, zero = rtn(x, s, torch.bfloat16)

    def surrounded(x, step):
        return op(x * 1.5 + 0.1, scale, zero, s.grid, torch.float32, step) * 2.0

    torch._dynamo.reset()
    compiled = torch.compile(surrounded, backend=backend, fullgraph=True)
    assert torch.equal(bits(compiled(x, step)), bits(surrounded(x, step)))


def test_the_served_scale_is_exact_at_the_start_and_rounded_after():
    scale = (torch.rand(1000) + 0.1).bfloat16()
    assert torch.equal(served_scale(scale, torch.zeros(1000), torch.bfloat16), scale)
    step = torch.randn(1000) * 0.1
    moved = served_scale(scale, step, torch.bfloat16)
    assert torch.equal(moved, (scale.float() * step.exp()).bfloat16())
    assert not torch.equal(moved, scale)
    assert float(served_scale(scale, torch.full((1000,), -200.0), torch.bfloat16).min()) > 0


def test_a_learned_step_is_in_the_codes():
    s = scheme(4, 32)
    x, step = torch.randn(8, 64), torch.randn(8, 2) * 0.3
    _, scale, _ = rtn(x, s, torch.bfloat16)
    served = served_scale(scale, step, torch.bfloat16)
    expected = dequantize(quantize(x, served, None, s.grid), served, None, torch.bfloat16)
    assert torch.equal(op(x, scale, None, s.grid, torch.bfloat16, step), expected)


def test_zero_codes_are_positive_zero():
    out = op(torch.tensor([[-0.1, 0.1, 1.0, -1.0]]), torch.ones(1, 1), None, IntGrid(4), torch.float32)
    assert bits(out).tolist() == bits(torch.tensor([[0.0, 0.0, 1.0, -1.0]])).tolist()


def test_the_operator_is_well_formed():
    s = scheme(4, 32)
    x = torch.randn(8, 64)
    _, scale, _ = rtn(x, s, torch.bfloat16)
    arguments = (x, scale, torch.zeros(8, 2), None, s.grid.qmin, s.grid.qmax, torch.bfloat16, torch.bfloat16)
    torch.library.opcheck(fake_quantize, arguments, test_utils=("test_schema", "test_faketensor"))


def test_a_watcher_sees_eager_and_compiled_calls():
    s = scheme(4, 32)
    x = torch.randn(8, 64)
    _, scale, _ = rtn(x, s, torch.bfloat16)
    seen = []

    def call(x):
        return op(x, scale, None, s.grid, torch.float32)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    compiled(x)  # compiled before anybody watches
    with watch(lambda master, result: seen.append((master.data_ptr(), result.clone()))):
        eager = call(x)
        compiled(x)
    call(x)
    assert [p for p, _ in seen] == [x.data_ptr()] * 2
    assert all(torch.equal(result, eager) for _, result in seen)
    with pytest.raises(AssertionError, match="one at a time"), watch(print), watch(print):
        pass
