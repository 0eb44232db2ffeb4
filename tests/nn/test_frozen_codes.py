"""Frozen codes: the exact derivative for scales, and codes that no step moves."""

import pytest
import torch
from tiny import scheme

from qat.nn.estimators import LSQ, StraightThrough
from qat.nn.fake_quantize import FakeQuantize
from qat.nn.frozen_codes import Follow, FrozenCodes, freeze_codes
from qat.nn.linear import QATLinear
from qat.nn.observers.minmax import MinMax
from qat.numerics.granularity import PerChannel
from qat.numerics.grid import IntGrid
from qat.numerics.scheme import Scheme


def linear(symmetric=True, estimator=None, bits=3, storage=torch.bfloat16, wide=False):
    rule = Scheme(IntGrid(bits), PerChannel(), symmetric) if wide else scheme(bits, 32, symmetric)
    quant = FakeQuantize(rule, (16, 64), MinMax(), estimator or LSQ(), storage, "w")
    module = QATLinear.from_float(torch.nn.Linear(64, 16), quant)
    quant.observe(module.weight)
    return module


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_gradient_is_the_derivative_of_the_levels(symmetric):
    """Closed form in float64, every code and both edges: d/ds sum G (q - z) s = sum G (q - z)."""
    grad, v = torch.randn(4, 9, dtype=torch.float64), torch.linspace(-6, 6, 36, dtype=torch.float64).view(4, 9)
    z = None if symmetric else torch.tensor([[1.0], [0.0], [-2.0], [3.0]], dtype=torch.float64)
    s = torch.rand(4, 1, dtype=torch.float64, requires_grad=True)
    codes = v.round().clamp(-4, 3)
    ((codes - (0 if z is None else z)) * s * grad).sum().backward()
    dx, ds = FrozenCodes().gradients(grad, v.clone(), -4, 3, z)
    assert torch.allclose(ds.sum(1, keepdim=True), s.grad, rtol=1e-12)
    assert not dx.any()


@pytest.mark.parametrize("estimator", [LSQ(), StraightThrough()])
@pytest.mark.parametrize("symmetric", [True, False])
def test_freezing_changes_no_value_and_leaves_the_scales_alone_to_train(symmetric, estimator):
    module, x = linear(symmetric, estimator), torch.randn(5, 64)
    with torch.no_grad():
        module.weight_fake_quant.log_step.normal_(0, 0.1)
    codes, before = module.weight_fake_quant.codes(module.weight), None
    freeze_codes(module)
    before = module(x)
    served = (codes.float() - _zero(module)).view(16, 2, 32) * module.weight_fake_quant.qparams()[0].float()[..., None]
    assert torch.equal(module.weight, served.view(16, 64))
    assert torch.equal(before, torch.nn.functional.linear(x, served.view(16, 64), module.bias))
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["weight_fake_quant.log_step"]
    before.square().sum().backward()
    analytic = module.weight_fake_quant.log_step.grad.clone()
    weight = served.view(16, 64).clone().requires_grad_()
    torch.nn.functional.linear(x, weight, module.bias).square().sum().backward()
    expected = (weight.grad * weight).detach().view(16, 2, 32).sum(-1)  # d/dlog s of (q - z) s is the weight itself
    assert torch.allclose(analytic, expected, rtol=1e-4, atol=1e-3)


def _zero(module):
    zero = module.weight_fake_quant.zero_point
    return 0 if zero is None else zero.float().repeat_interleave(32, 1)


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_no_step_moves_a_code_however_far_the_scale_goes(symmetric, storage, bits):
    module = linear(symmetric, bits=bits, storage=storage, wide=True)
    codes = module.weight_fake_quant.codes(module.weight)
    freeze_codes(module)
    optimizer = torch.optim.AdamW([module.weight_fake_quant.log_step], lr=0.05)
    optimizer.register_step_post_hook(Follow(module))
    before = module.weight_fake_quant.qparams()[0].clone()
    for _ in range(20):
        optimizer.zero_grad()
        (module(torch.randn(5, 64)) - 3).square().mean().backward()
        optimizer.step()
        assert torch.equal(module.weight_fake_quant.codes(module.weight), codes)
    assert float((module.weight_fake_quant.qparams()[0].float() / before.float() - 1).abs().max()) > 0.2


def test_without_following_codes_would_move():
    module = linear(bits=8, wide=True)
    codes = module.weight_fake_quant.codes(module.weight)
    freeze_codes(module)
    with torch.no_grad():
        module.weight_fake_quant.log_step.fill_(0.05)
    assert not torch.equal(module.weight_fake_quant.codes(module.weight), codes)
