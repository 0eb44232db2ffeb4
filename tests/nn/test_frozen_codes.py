"""Frozen codes: the exact derivative for scales, and codes that no step moves."""

import pytest
import torch
from tiny import scheme
from tiny_grids import OTHERS

from qat.nn.embedding import QATEmbedding
from qat.nn.estimators import LSQ, Clipped, Rounded, StraightThrough
from qat.nn.fake_quantize import FakeQuantize
from qat.nn.frozen_codes import Follow, FrozenCodes, freeze_codes
from qat.nn.linear import QATLinear
from qat.nn.lora import LowRank
from qat.nn.observers.minmax import MinMax
from qat.numerics.affine import group
from qat.numerics.granularity import PerChannel
from qat.numerics.grid import IntGrid
from qat.numerics.scheme import Scheme


def linear(symmetric=True, estimator=None, bits=3, storage=torch.bfloat16, wide=False, rule=None):
    rule = rule or (Scheme(IntGrid(bits), PerChannel(), symmetric) if wide else scheme(bits, 32, symmetric))
    quant = FakeQuantize(rule, (16, 64), MinMax(), estimator or LSQ(), storage, "w")
    module = QATLinear.from_float(torch.nn.Linear(64, 16), quant)
    quant.observe(module.weight)
    return module


@pytest.mark.parametrize("name", ["int", "asymmetric", "nvfp4", "PerChannel()_nf4", "fp8_tensor"])
def test_the_gradient_is_the_derivative_of_the_levels(name):
    """Closed form, every code and both edges: d/dlog s of the result is the result, whatever the grid."""
    rule = {"int": scheme(3), "asymmetric": scheme(3, symmetric=False)}.get(name) or OTHERS[name]
    module, grad = linear(rule=rule), torch.randn(16, 64)
    with torch.no_grad():
        module.weight[:, ::3].mul_(4)  # beyond the outermost levels, since scales are those of before
    freeze_codes(module)
    module.weight_fake_quant(module.weight, torch.float32).backward(grad)
    expected = group((module.weight * grad).detach().double(), module.weight_fake_quant.scale).sum(-1)
    assert torch.allclose(module.weight_fake_quant.log_step.grad.double(), expected, rtol=1e-4, atol=1e-4)


def test_weights_get_nothing():
    grad, u = torch.randn(4, 9), torch.linspace(-6, 6, 36).view(4, 9)
    dx, ds, dz = FrozenCodes().gradients(grad, Rounded(u, u.round(), -4, 3, 0.5, True, 3, 3.5, 9))
    assert not dx.any()
    assert torch.equal(ds, u.round() * grad)
    assert dz is None


def test_an_embedding_trains_its_scales_and_a_tied_pair_is_held_once():
    table = torch.nn.Embedding(16, 64)
    quant = FakeQuantize(scheme(3), (16, 64), MinMax(), LSQ(), torch.bfloat16, "e")
    quant.observe(table.weight)
    pair = torch.nn.ModuleDict({"embed": QATEmbedding.from_float(table, quant)})
    head = torch.nn.Linear(64, 16, bias=False)
    head.weight = table.weight
    for tied in (False, True):
        if tied:
            pair["head"] = QATLinear.from_float(head, quant)
        freeze_codes(pair)
        follow = Follow(pair)
        assert len(follow._codes) == 1
        codes = quant.codes(table.weight)
        pair["embed"](torch.tensor([3, 5])).sum().backward()
        assert table.weight.grad is None
        assert quant.log_step.grad[3].all()
        with torch.no_grad():
            quant.log_step.add_(0.3)
        follow()
        assert torch.equal(quant.codes(table.weight), codes)
        quant.log_step.grad = None


def test_powers_of_two_are_not_learned():
    with pytest.raises(ValueError, match=r"^w: scales of .* are powers of two; use optim.train=all"):
        freeze_codes(linear(rule=OTHERS["mxfp4"], estimator=Clipped()))


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


def test_codes_of_a_sum_that_trains_cannot_be_frozen():
    module = linear()
    module.adapter = LowRank(16, 64, 2, 4.0, torch.Generator())
    with pytest.raises(ValueError, match=r"^w: an adapter trains A and B"):
        freeze_codes(module)


def test_without_following_codes_would_move():
    module = linear(bits=8, wide=True)
    codes = module.weight_fake_quant.codes(module.weight)
    freeze_codes(module)
    with torch.no_grad():
        module.weight_fake_quant.log_step.fill_(0.05)
    assert not torch.equal(module.weight_fake_quant.codes(module.weight), codes)
