"""Phases, what is learned, and the gradient that reaches masters and scales."""

import copy

import pytest
import torch
from tiny import scheme

from qat.nn.estimators import LSQ, Clipped, StraightThrough
from qat.nn.fake_quantize import FakeQuantize, Phase, kept
from qat.nn.observers.minmax import MinMax
from qat.nn.observers.mse import MSE
from qat.numerics.affine import dequantize, rtn
from qat.numerics.granularity import PerToken
from qat.numerics.grid import IntGrid
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
    quant(w, F32)
    before = quant.scale.clone()
    quant(2 * w, F32)
    assert torch.equal(quant.scale, 2 * before)
    quant.phase = Phase.FROZEN
    quant(5 * w, F32)
    assert torch.equal(quant.scale, 2 * before)


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
    v = w.detach().view(16, 2, 32) / s + (0 if z is None else z)
    dx, ds = LSQ().gradients(grad.view(16, 2, 32), v, -8, 7, z)
    assert torch.allclose(w.grad, dx.view(16, 64))
    assert torch.allclose(quant.log_step.grad, ds.sum(-1) * scale.float(), rtol=1e-5, atol=1e-7)


def test_the_learned_scale_lowers_the_rounding_error():
    quant, w = make(bits=2), torch.randn(16, 64)
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
