"""The gradient as an operator: what it dispatches on, and that it is the estimator's rule, eager and compiled."""

import pickle
import shutil
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from tiny import scheme

from qat.nn.backward import LARGEST, _backward, backward_reference, fake_quantize_backward, fused_mask
from qat.nn.estimators import LSQ, PACT, SEQ, Clipped, EfficientQAT, LSQPlus, StraightThrough
from qat.nn.fake_quantize import FakeQuantize, Phase
from qat.nn.interned import intern
from qat.nn.observers.minmax import MinMax
from qat.numerics.grid import IntGrid


@dataclass(frozen=True)
class Halved:
    """An estimator of somebody else's."""

    learns_scale: ClassVar[bool] = True
    learns_zero: ClassVar[bool] = False

    def gradients(self, grad, rounded):
        return grad / 2, rounded.level * grad, None


def made(estimator, symmetric=True):
    quant = FakeQuantize(scheme(4, 32, symmetric), (16, 64), MinMax(), estimator, torch.bfloat16, "w")
    quant.observe(torch.randn(16, 64))
    quant.phase = Phase.LEARN
    return quant


def test_which_estimators_the_kernel_computes():
    assert fused_mask(LSQ(), 64, True) == fused_mask(LSQPlus(False), 64, True) == "between"
    assert fused_mask(Clipped(), 64, False) == fused_mask(EfficientQAT(), 64, True) == "rounded"
    assert fused_mask(StraightThrough(), 64, False) == "all"
    assert all(fused_mask(e, 64, True) is None for e in (PACT(), SEQ(), Halved()))
    assert fused_mask(LSQ(), LARGEST, True) == "between"
    assert fused_mask(LSQ(), LARGEST + 1, True) is None
    assert fused_mask(LSQ(), LARGEST + 1, False) == "between"

    class Heir(LSQ):
        pass

    assert fused_mask(Heir(), 64, True) is None


def test_what_is_not_wanted_is_not_there():
    grad, x, s = torch.randn(16, 64), torch.randn(16, 64), torch.rand(16, 2) + 0.1
    found = fake_quantize_backward(grad, x, s, "int4", intern(LSQ()), 32, (False, True, False))
    assert found[0] is found[2] is None
    dx, dlog, _ = backward_reference(grad, x, s, None, None, None, IntGrid(4), LSQ(), 32, (True, True, False))
    assert torch.equal(found[1], dlog)
    assert torch.equal(fake_quantize_backward(grad, x, s, "int4", intern(LSQ()), 32, (True, False, False))[0], dx)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("estimator", [LSQPlus(False), EfficientQAT()])
def test_gradients_are_autograds_in_float64_with_a_learned_zero_point_and_in_every_dtype(estimator, dtype):
    """s stays as it was served, whatever x is in, and z is the one that moved."""

    def rounded(value):
        return value + (torch.round(value) - value).detach()

    grad, x, s0 = torch.randn(16, 2, 32), torch.randn(16, 2, 32).to(dtype), torch.rand(16, 2) / 4 + 0.1
    s0[::3] *= -1  # as the signed convention has some
    zero, step = torch.randint(-4, 4, (16, 2), dtype=torch.int8), torch.randn(16, 2) * 3
    w, log = x.double().requires_grad_(), torch.zeros(16, 2, 1, dtype=torch.float64, requires_grad=True)
    shift = step.double().unsqueeze(-1).requires_grad_()
    s, z = s0.double().unsqueeze(-1) * log.exp(), rounded(zero.unsqueeze(-1) + shift)
    z = z + (z.clamp(-8, 7) - z).detach()
    if estimator == EfficientQAT():
        result = (torch.clamp(rounded(w / s) + z, -8, 7) - z) * s
    else:
        result = rounded(torch.minimum(torch.maximum(w / s, -8 - z), 7 - z)) * s
    result.backward(grad.double())
    flat, wanted = (16, 64), (True, True, True)
    found = backward_reference(grad.view(flat), x.view(flat), s0, zero, step, None, IntGrid(4), estimator, 32, wanted)
    assert torch.allclose(found[0].double().view(x.shape), w.grad, rtol=2.0**-8 if dtype == torch.bfloat16 else 1e-6)
    assert bool((found[0] == 0).any())
    for ours, theirs in zip(found[1:], (log.grad, shift.grad), strict=True):
        assert bool(theirs.any())
        assert torch.allclose(ours.double(), theirs.squeeze(-1), rtol=1e-5, atol=1e-5)


def test_the_operator_is_well_formed():
    grad, x, s = torch.randn(16, 64), torch.randn(16, 64), torch.rand(16, 2) + 0.1
    zero, step = torch.ones(16, 2, dtype=torch.int8), torch.randn(16, 2)
    for estimator in (StraightThrough(), LSQPlus()):
        for strength in (None, torch.tensor(0.5)):
            wanted = [True, estimator.learns_scale, estimator.learns_zero]
            arguments = (grad, x, s, zero, step, strength, "int4", intern(estimator), 32, wanted)
            torch.library.opcheck(_backward, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(
    "estimator", [LSQ(), LSQPlus(), EfficientQAT(), Clipped(), StraightThrough(), PACT(), Halved()]
)
def test_compiled_equals_eager(estimator, backend):
    if backend == "inductor" and shutil.which("g++") is None:
        pytest.skip("inductor needs a C++ compiler")
    quant, grad = made(estimator, symmetric=False), torch.randn(16, 64)
    x, found = torch.randn(16, 64) * 1.5, []
    torch._dynamo.reset()
    for call in (quant, torch.compile(quant, backend=backend, fullgraph=True)):
        quant.zero_grad(set_to_none=True)
        w = x.clone().requires_grad_()
        call(w, torch.float32).backward(grad)
        found.append([w.grad, *(p.grad for p in quant.parameters() if p.grad is not None)])
    assert len(found[0]) == 1 + estimator.learns_scale + estimator.learns_zero
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    torch._dynamo.reset()


def test_straight_through_hands_the_gradient_on_as_a_tensor_of_its_own():
    grad, x, s = torch.randn(16, 64), torch.randn(16, 64), torch.rand(16, 2) + 0.1
    dx, *_ = fake_quantize_backward(grad, x, s, "int4", intern(StraightThrough()), 32, (True, False, False))
    assert torch.equal(dx, grad)
    assert dx.data_ptr() != grad.data_ptr()


def test_a_pickled_module_interns_its_estimator_again(monkeypatch):
    stored = pickle.dumps(made(LSQ(False)))
    monkeypatch.setattr("qat.nn.interned._known", {})
    quant, w = pickle.loads(stored), torch.randn(16, 64, requires_grad=True)
    quant(w, torch.float32).sum().backward()
    assert w.grad is not None
    quant.estimator = Clipped()
    w.grad = None
    quant(w, torch.float32).sum().backward()
    assert quant.estimator == Clipped()
