"""Phases, what is learned, and the gradient that reaches masters and scales."""

import copy

import pytest
import torch
from tiny import scheme
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from qat.nn.estimators import LSQ, Clipped, EfficientQAT, LSQPlus, Rounded, StraightThrough
from qat.nn.fake_quantize import FakeQuantize, Phase, kept
from qat.nn.observers.ema import EMA
from qat.nn.observers.minmax import MinMax
from qat.nn.observers.mse import MSE
from qat.numerics.affine import dequantize, rtn
from qat.numerics.granularity import PerGroup, PerTensor, PerToken
from qat.numerics.grid import FloatGrid, IntGrid
from qat.numerics.levels import snap
from qat.numerics.scheme import Scheme

F32 = torch.float32


def make(estimator=None, symmetric=True, observer=None, bits=4):
    return FakeQuantize(
        scheme(bits, 32, symmetric), (16, 64), observer or MinMax(), estimator or LSQ(), torch.bfloat16, "w"
    )


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("phase", [Phase.OBSERVE, Phase.FROZEN, Phase.LEARN])
def test_every_active_phase_starts_at_rtn(phase, symmetric):
    quant, w = make(symmetric=symmetric), torch.randn(16, 64)
    quant.observe(w)
    quant.phase = phase
    codes, scale, zero = rtn(w, quant.scheme, torch.bfloat16)
    for dtype in (F32, torch.bfloat16):
        assert torch.equal(quant(w, dtype), dequantize(codes, scale, zero, dtype))
    assert torch.equal(quant.codes(w), codes)


def test_off_is_the_tensor_itself():
    quant, w = make(), torch.randn(16, 64)
    quant.phase = Phase.OFF
    assert quant(w, F32) is w
    assert torch.equal(quant(w, torch.bfloat16), w.bfloat16())


def test_observe_follows_frozen_stays():
    quant, w = make(), torch.randn(16, 64)
    quant.phase = Phase.OBSERVE
    quant.observe(w)
    before = quant.scale.clone()
    quant.observe(2 * w)
    assert torch.equal(quant.scale, 2 * before)
    for phase in (Phase.OBSERVE, Phase.FROZEN):
        quant.phase = phase
        quant(5 * w, F32)
        assert torch.equal(quant.scale, 2 * before)


def test_what_was_learned_is_forgotten_by_an_observation():
    quant, w = make(LSQPlus(), symmetric=False), torch.randn(16, 64)
    with torch.no_grad():
        quant.log_step.normal_()
        quant.zero_step.normal_(0, 4)
    quant.observe(w)
    assert not quant.log_step.any()
    assert not quant.zero_step.any()
    assert torch.equal(quant.codes(w), rtn(w, quant.scheme, torch.bfloat16)[0])


def test_learn_trains_scale_and_master_only_if_the_estimator_can():
    for estimator, learns in ((LSQ(), True), (Clipped(), False), (StraightThrough(), False)):
        quant, w = make(estimator), torch.randn(16, 64, requires_grad=True)
        quant.observe(w)
        quant.phase = Phase.LEARN
        (quant(w, F32) * torch.randn(16, 64)).sum().backward()
        assert w.grad is not None
        assert (quant.log_step.grad is not None) is learns


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_gradient_is_the_estimators_summed_over_each_group(symmetric):
    quant, w = make(symmetric=symmetric), torch.randn(16, 64, requires_grad=True)
    quant.observe(w)
    with torch.no_grad():
        quant.log_step.normal_(0, 0.2)
    quant.phase = Phase.LEARN
    grad = torch.randn(16, 64)
    quant(w, F32).backward(grad)
    scale, zero = quant.qparams()
    s = scale.float().unsqueeze(-1)
    z = None if zero is None else zero.float().unsqueeze(-1)
    u, low, high = w.detach().view(16, 2, 32) / s, -8 - (0 if z is None else z), 7 - (0 if z is None else z)
    rounded = Rounded(u, snap(u, IntGrid(4), z), low, high, 0.5, True, 7, 7.5, 32)
    dx, ds, _ = LSQ().gradients(grad.view(16, 2, 32), rounded)
    assert torch.allclose(w.grad, dx.view(16, 64))
    assert torch.allclose(quant.log_step.grad, ds.sum(-1) * scale.float(), rtol=1e-5, atol=1e-7)


def test_the_learned_scale_lowers_the_rounding_error():
    plain = Scheme(IntGrid(2), PerGroup(32))  # by whose convention a min-max step is far too long
    quant, w = FakeQuantize(plain, (16, 64), MinMax(), LSQ(), torch.bfloat16, "w"), torch.randn(16, 64)
    quant.observe(w)
    quant.phase = Phase.LEARN
    optimizer = torch.optim.Adam([quant.log_step], lr=0.05)
    errors = []
    for _ in range(60):
        error = (quant(w, F32) - w).square().mean()
        errors.append(float(error.detach()))
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
    assert min(errors) < 0.8 * errors[0]


def test_dynamic_schemes_keep_no_state():
    token = Scheme(IntGrid(8), PerToken(), dynamic=True)
    quant = FakeQuantize(token, None, MinMax(), LSQ(), torch.bfloat16, "x")
    assert not list(quant.parameters())
    assert not list(quant.buffers())
    x = torch.randn(2, 5, 64, requires_grad=True)
    codes, scale, _ = rtn(x.detach(), token, F32)
    out = quant(x, F32)
    assert torch.equal(out, dequantize(codes, scale, None, F32))
    out.sum().backward()
    assert x.grad is not None


def test_what_is_not_finite_names_the_module():
    with pytest.raises(ValueError, match=r"^w: a scale is not finite"):
        make().observe(torch.full((16, 64), float("nan")))


def test_state_survives_a_round_trip():
    quant, other, w = make(symmetric=False), make(symmetric=False), torch.randn(16, 64)
    quant.observe(w)
    with torch.no_grad():
        quant.log_step.normal_()
    other.load_state_dict(quant.state_dict())
    assert torch.equal(other.codes(w), quant.codes(w))


def test_kept_computes_once_for_each_dtype_and_forgets_afterwards():
    quant, w = make(observer=MSE(4)), torch.randn(16, 64)
    quant.observe(w)
    quant.phase = Phase.FROZEN
    model = torch.nn.ModuleList([quant])
    before = quant(w, F32)
    with kept(model):
        first = quant(w, F32)
        assert quant(w, F32) is first
        assert quant(w, torch.bfloat16).dtype == torch.bfloat16
        assert not first.requires_grad
    assert torch.equal(first, before)
    assert quant(w + 1, F32) is not first
    assert torch.equal(quant(2 * w, F32), copy.deepcopy(quant)(2 * w, F32))


@pytest.mark.parametrize("estimator", [LSQPlus(), EfficientQAT()], ids=["lsq_plus", "efficient_qat"])
def test_a_learned_zero_point_moves_by_whole_codes_and_is_what_is_stored(estimator):
    quant, w = make(estimator, symmetric=False, bits=2), torch.randn(16, 64, requires_grad=True)
    quant.observe(w)
    quant.phase = Phase.LEARN
    start = quant.qparams()[1].clone()
    (quant(2 * w, F32) * torch.randn(16, 64)).sum().backward()  # twice the range: many clip
    assert float(quant.zero_step.grad.abs().sum()) > 0
    with torch.no_grad():
        quant.zero_step.fill_(0.6)
    moved = quant.qparams()[1]
    assert torch.equal(moved, (start + 1).clamp(-2, 1))
    expected = dequantize(quant.codes(w), quant.qparams()[0], moved, F32)
    assert torch.equal(quant(w, F32), expected)
    quant.phase = Phase.FROZEN
    quant.zero_step.grad = None
    quant(w, F32).sum().backward()
    assert quant.zero_step.grad is None


def test_the_gradient_of_a_zero_point_is_the_estimators_times_the_scale():
    quant, w = make(EfficientQAT(), symmetric=False, bits=2), torch.randn(16, 64)
    quant.observe(w / 3)  # so that many clip
    quant.phase = Phase.LEARN
    grad = torch.randn(16, 64)
    quant(w, F32).backward(grad)
    scale, zero = quant.qparams()
    v = torch.round(w.view(16, 2, 32) / scale.float().unsqueeze(-1)) + zero.unsqueeze(-1)
    outside = (v < -2) | (v > 1)
    expected = -(grad.view(16, 2, 32) * outside).sum(-1) * scale.float()
    assert torch.allclose(quant.zero_step.grad, expected, rtol=1e-4, atol=1e-6)


def static(observer, estimator=None):
    whole = Scheme(IntGrid(8), PerTensor(), scale_dtype="float32")
    return FakeQuantize(whole, (1,), observer, estimator or Clipped(), torch.bfloat16, "x (input)", running=True)


def test_a_running_range_is_that_of_all_batches():
    quant = static(MinMax())
    for size in (1.0, 3.0, 2.0):
        quant(torch.tensor([[-size, size / 2]]), F32)
    assert float(quant.scale) == float(torch.tensor(3.0) / 127.5)
    assert int(quant.seen) == 3
    averaged = static(EMA(0.5))
    for size in (1.0, 3.0):
        averaged(torch.tensor([[-size, size / 2]]), F32)
    assert float(averaged.scale) == pytest.approx(2.0 / 127.5)


def test_lsqs_n_of_an_activation_is_its_features_whatever_the_batch():
    """So that the rate of a scale is not that of the batch's size (arXiv:1902.08153, section 2.2)."""
    for shape in ((2, 5, 64), (3, 7, 64)):
        x, grad, found = torch.randn(shape), torch.randn(shape), []
        for estimator in (LSQ(), LSQ(False)):
            quant = static(MinMax(), estimator)
            quant(x / 2, F32)
            quant.phase = Phase.LEARN
            quant(x, F32).backward(grad)
            found.append(quant.log_step.grad)
        assert torch.allclose(found[0], found[1] / (64 * 127) ** 0.5, rtol=1e-5)


def test_a_running_range_stands_still_in_evaluation_and_in_recomputation():
    quant, x = static(EMA(0.5)), torch.randn(4, 16, requires_grad=True)
    linear = torch.nn.Linear(16, 4)

    def block(x):
        return linear(quant(x, F32))

    checkpoint(block, x, use_reentrant=False).sum().backward()
    assert int(quant.seen) == 1
    quant.eval()
    quant(5 * x, F32)
    assert int(quant.seen) == 1
    assert float(quant.high) == float(x.detach().max())


def test_a_dynamic_two_level_scheme_keeps_its_global_scale_only():
    nvfp4 = Scheme(FloatGrid("e2m1"), PerGroup(16), dynamic=True, scale_dtype="float8_e4m3fn")
    quant, x = FakeQuantize(nvfp4, None, MinMax(), Clipped(), torch.bfloat16, "x", running=True), torch.randn(3, 32)
    quant(x, F32)
    quant.phase = Phase.FROZEN
    g = quant.global_scale
    assert float(g) == pytest.approx(448 * 6 / float(x.abs().max()))
    codes, scale, _ = rtn(x, nvfp4, F32, g)
    assert torch.equal(quant(x, F32), dequantize(codes, scale, None, F32, nvfp4.grid, g))
    assert torch.equal(quant(x / 2, F32), quant(x / 2, F32))
    assert torch.equal(quant.global_scale, g)


@pytest.mark.parametrize("estimator", [LSQ(), LSQPlus(), EfficientQAT(), Clipped()])
def test_with_half_its_strength_half_the_gradient_goes_straight(estimator):
    w, grad = torch.randn(16, 64), torch.randn(16, 64)
    found = []
    for strength in (0.0, 0.5, 1.0):
        quant, x = make(estimator, symmetric=False), w.clone().requires_grad_()
        quant.observe(w / 2)
        quant.phase, quant.strength = Phase.LEARN, strength
        quant(x, F32).backward(grad)
        steps = [p.grad for p in (quant.log_step, quant.zero_step) if p is not None and p.requires_grad]
        found.append([x.grad, *steps])
    assert torch.equal(found[0][0], grad)
    assert all(bool((step == 0).all()) for step in found[0][1:])  # nothing is quantized, so no scale has a say
    assert all(bool((step != 0).any()) for step in found[2][1:])
    for none, half, whole in zip(*found, strict=True):
        assert torch.allclose(half, (none + whole) / 2, rtol=1e-4, atol=1e-6)


def test_a_ramp_is_compiled_once_and_computes_the_same():
    """And once more at its end: a number that compiled code knows would be compiled anew in every step."""
    quant, grad = make(symmetric=False), torch.randn(16, 64)
    quant.observe(torch.randn(16, 64))
    quant.phase = Phase.LEARN
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(quant, backend=counter, fullgraph=True)
    x = torch.randn(16, 64)
    compilations = []
    for strength in (0.0, 0.25, 0.5, 0.75, 1.0, 1.0):
        quant.strength, found = strength, []
        for call in (quant, compiled):
            w, quant.log_step.grad = x.clone().requires_grad_(), None
            result = call(w, F32)
            result.backward(grad)
            found.append((result, w.grad, quant.log_step.grad))
        assert all(torch.equal(eager, ours) for eager, ours in zip(*found, strict=True))
        compilations.append(counter.frame_count)
    assert [n - compilations[0] for n in compilations] == [0, 0, 0, 0, 1, 1]
    torch._dynamo.reset()
