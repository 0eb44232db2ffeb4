"""Law (b): fake-quantization equals dequantize(quantize(w)) bit for bit; eager equals compiled."""

import shutil

import pytest
import torch
from tiny import scheme
from tiny_grids import DTYPES, OTHERS, bits, thousand_seeds

from qat.kernels.fake_quant import _fake_quantize, fake_quantize, fused, grid_of, served_scale, served_zero, watch
from qat.numerics.affine import dequantize, divisor, quantize, rtn
from qat.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from qat.numerics.grid import Codebook, FloatGrid, IntGrid
from qat.numerics.scheme import Scheme


def op(x, scale, zero, grid, dtype, step=None, g=None):
    return fake_quantize(x, scale, grid, dtype, log_step=step, zero_point=zero, global_scale=g)[0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(), PerGroup(16), PerToken()], ids=str)
def test_law_b_over_a_thousand_seeds(granularity, symmetric, dtype):
    """Integers: every width, three storage dtypes."""
    x = thousand_seeds(alike=isinstance(granularity, PerTensor))
    for width in (2, 3, 4, 5, 6, 7, 8):
        s = Scheme(IntGrid(width), granularity, symmetric, dynamic=isinstance(granularity, PerToken))
        for storage in DTYPES if width in (3, 4, 8) else (torch.bfloat16,):
            codes, scale, zero = rtn(x, s, storage)
            expected = dequantize(codes, scale, zero, dtype)
            assert torch.equal(bits(op(x, scale, zero, s.grid, dtype)), bits(expected)), (width, storage)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("s", OTHERS.values(), ids=OTHERS)
def test_law_b_on_every_other_grid(s, dtype):
    x = thousand_seeds(alike=isinstance(s.granularity, PerTensor))
    g = divisor((x,), s)
    for storage in DTYPES:
        codes, scale, zero = rtn(x, s, storage, g)
        expected = dequantize(codes, scale, zero, dtype, s.grid, g)
        assert torch.equal(bits(op(x, scale, zero, s.grid, dtype, g=g)), bits(expected)), storage


@pytest.mark.parametrize("s", [OTHERS["nvfp4"], OTHERS["mxfp4"], OTHERS["fp8_channel"]], ids=str)
def test_a_learned_step_stays_on_the_scales_grid(s):
    """A learned scale is rounded to what its dtype holds, and codes follow from the rounded one."""
    x = torch.randn(64, 32)
    g = divisor((x,), s)
    _, scale, _ = rtn(x, s, torch.bfloat16, g)
    step = torch.randn(scale.shape) * 0.5
    stored = served_scale(scale, step)
    assert stored.dtype == scale.dtype
    codes = quantize(x, stored, None, s.grid, g)
    expected = dequantize(codes, stored, None, torch.bfloat16, s.grid, g)
    assert torch.equal(op(x, scale, None, s.grid, torch.bfloat16, step, g), expected)
    assert not torch.equal(stored.float(), scale.float())


def test_a_learned_zero_point_is_rounded_into_the_grid():
    s = scheme(4, 32, symmetric=False)
    x = torch.randn(8, 64)
    _, scale, zero = rtn(x, s, torch.bfloat16)
    step = torch.tensor([[0.4, 0.6]] * 4 + [[-30.0, 30.0]] * 4)
    moved = served_zero(zero, step, s.grid)
    assert torch.equal(moved[:4], (zero[:4] + torch.tensor([0, 1], dtype=torch.int8)).clamp(-8, 7))
    assert moved[4:].tolist() == [[-8, 7]] * 4
    result, _ = fake_quantize(x, scale, s.grid, torch.float32, zero_point=zero, zero_step=step)
    assert torch.equal(result, dequantize(quantize(x, scale, moved, s.grid), scale, moved, torch.float32))


def test_strength_is_how_far_the_tensor_goes():
    s = scheme(4, 32)
    x = torch.randn(8, 64)
    _, scale, _ = rtn(x, s, torch.bfloat16)
    there = op(x, scale, None, s.grid, torch.float32)
    for strength in (0.0, 0.25, 1.0):
        found, _ = fake_quantize(x, scale, s.grid, torch.float32, strength=torch.tensor(strength))
        assert torch.allclose(found, x + strength * (there - x), atol=1e-6)
    assert torch.equal(fake_quantize(x, scale, s.grid, torch.float32, strength=torch.tensor(0.0))[0], x)


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
    assert torch.equal(served_scale(scale, torch.zeros(1000)), scale)
    step = torch.randn(1000) * 0.1
    moved = served_scale(scale, step)
    assert torch.equal(moved, (scale.float() * step.exp()).bfloat16())
    assert not torch.equal(moved, scale)
    assert float(served_scale(scale, torch.full((1000,), -200.0)).min()) > 0


def test_a_learned_step_is_in_the_codes():
    s = scheme(4, 32)
    x, step = torch.randn(8, 64), torch.randn(8, 2) * 0.3
    _, scale, _ = rtn(x, s, torch.bfloat16)
    served = served_scale(scale, step)
    expected = dequantize(quantize(x, served, None, s.grid), served, None, torch.bfloat16)
    assert torch.equal(op(x, scale, None, s.grid, torch.bfloat16, step), expected)


def test_zero_codes_are_positive_zero():
    out = op(torch.tensor([[-0.1, 0.1, 1.0, -1.0]]), torch.ones(1, 1), None, IntGrid(4), torch.float32)
    assert bits(out).tolist() == bits(torch.tensor([[0.0, 0.0, 1.0, -1.0]])).tolist()


def test_the_operator_is_well_formed():
    s = scheme(4, 32)
    x = torch.randn(8, 64)
    _, scale, _ = rtn(x, s, torch.bfloat16)
    for rows in (None, torch.tensor([7, 0, 7])):
        arguments = (x, scale, torch.zeros(8, 2), None, None, None, "int4", torch.tensor(0.5), torch.bfloat16, rows)
        torch.library.opcheck(_fake_quantize, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_some_rows_are_those_of_the_whole_on_every_grid(dtype):
    x, rows = torch.randn(9, 32), torch.tensor([8, 0, 3, 3])
    asymmetric = {f"asym_{g}": Scheme(IntGrid(4), g, symmetric=False) for g in (PerTensor(), PerGroup(16))}
    for name, s in {**OTHERS, **asymmetric}.items():
        if s.dynamic:
            continue
        g = divisor((x,), s)
        _, scale, zero = rtn(x, s, torch.bfloat16, g)
        learned = {"log_step": torch.randn(scale.shape) * 0.1, "zero_point": zero, "global_scale": g}
        learned["zero_step"] = None if zero is None else torch.randn(scale.shape)
        whole, s_whole = fake_quantize(x, scale, s.grid, dtype, **learned)
        found, s_found = fake_quantize(x, scale, s.grid, dtype, **learned, rows=rows)
        assert torch.equal(bits(found), bits(whole[rows])), name
        assert torch.equal(s_found, s_whole if scale.dim() == 1 else s_whole[rows]), name


def test_a_watcher_sees_eager_and_compiled_calls():
    s = scheme(4, 32)
    x = torch.randn(8, 64)
    _, scale, _ = rtn(x, s, torch.bfloat16)
    seen = []

    def call(x):
        return op(x, scale, None, s.grid, torch.float32)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    compiled(x)  # compiled before anybody watches
    with watch(lambda scale, result, rows: seen.append((scale.data_ptr(), result.clone()))):
        eager = call(x)
        compiled(x)
    call(x)
    assert [p for p, _ in seen] == [scale.data_ptr()] * 2
    assert all(torch.equal(result, eager) for _, result in seen)
    with watch(lambda scale, result, rows: seen.append((scale.data_ptr(), rows.tolist()))):
        fake_quantize(x, scale, s.grid, torch.float32, rows=torch.tensor([2, 5]))
    assert seen[-1] == (scale.data_ptr(), [2, 5])
    with pytest.raises(AssertionError, match="one at a time"), watch(print), watch(print):
        pass


@pytest.mark.parametrize("grid", [IntGrid(3), FloatGrid("e4m3"), FloatGrid("e2m1"), Codebook("nf4")], ids=str)
def test_a_grid_comes_back_from_its_name(grid):
    assert grid_of(str(grid)) == grid


def test_what_triton_computes(monkeypatch):
    monkeypatch.setattr("qat.kernels.fake_quant._has_triton", lambda: True)
    for grid in (IntGrid(2), IntGrid(8), FloatGrid("e4m3"), FloatGrid("e2m1")):
        assert all(fused("cuda", dtype, grid, False) for dtype in DTYPES)
        assert not fused("cpu", torch.float32, grid, False)
        assert not fused("cuda", torch.float64, grid, False)
        assert not fused("cuda", torch.float32, grid, True)
    assert not fused("cuda", torch.float32, Codebook("nf4"), False)
    monkeypatch.setattr("qat.kernels.fake_quant._has_triton", lambda: False)
    assert not fused("cuda", torch.float32, IntGrid(4), False)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gpu_rounds_as_a_cpu_does_eager_and_compiled(dtype):
    """Every grid, a thousand seeds, learned steps included: exp is the one function that may differ, so it is given."""
    x = thousand_seeds()
    integers = {
        f"int{b}{'' if s else '_asym'}": Scheme(IntGrid(b), PerGroup(16), s) for b in (2, 3, 4, 8) for s in (1, 0)
    }
    for name, s in {**OTHERS, **integers}.items():
        g = divisor((x,), s)
        _, scale, zero = rtn(x, s, torch.bfloat16, g)
        expected = op(x, scale, zero, s.grid, dtype, g=g)
        parts = [None if t is None else t.cuda() for t in (x, scale, zero, g)]
        assert torch.equal(bits(op(*parts[:3], s.grid, dtype, g=parts[3])).cpu(), bits(expected)), name
        some, _ = fake_quantize(parts[0], parts[1], s.grid, dtype, zero_point=parts[2], global_scale=parts[3],
                                rows=torch.tensor([5, 0, 5]).cuda())  # fmt: skip
        assert torch.equal(bits(some).cpu(), bits(expected[[5, 0, 5]])), f"{name}, some rows"
        torch._dynamo.reset()
        compiled = torch.compile(lambda *p, s=s: op(*p[:3], s.grid, dtype, g=p[3]))
        assert torch.equal(bits(compiled(*parts)).cpu(), bits(expected)), f"{name}, compiled"
        found = [t if t is None else t.cpu() for t in rtn(parts[0], s, torch.bfloat16, parts[3])]
        for ours, theirs in zip(rtn(x, s, torch.bfloat16, g), found, strict=True):
            assert ours is None or torch.equal(ours.float(), theirs.float()), name
