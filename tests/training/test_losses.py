"""Losses against torch's own, values and gradients; chunking changes nothing; no fp32 copy of the logits."""

import pytest
import torch
import torch.nn.functional as F

from qat.training import losses
from qat.training.losses import Loss, cross_entropy, forward_kl


@pytest.fixture(params=[7, 64, 10_000])
def chunk(request, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK", request.param)


def logits(n=9, v=50, dtype=torch.float32, scale=3.0):
    return (torch.randn(n, v) * scale).to(dtype)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_kl_and_its_gradient(dtype):
    student, teacher = logits(dtype=dtype).requires_grad_(), logits(dtype=dtype)
    weights = torch.rand(9)
    (forward_kl(student, teacher) * weights).sum().backward()
    other = student.detach().double().requires_grad_()
    p = teacher.double().log_softmax(-1)
    expected = F.kl_div(other.log_softmax(-1), p, log_target=True, reduction="none").sum(-1)
    (expected * weights).sum().backward()
    assert torch.allclose(forward_kl(student, teacher).double(), expected, rtol=1e-4, atol=1e-5)
    tolerance = 1e-6 if dtype is torch.float32 else 2e-3
    assert student.grad.dtype == dtype
    assert torch.allclose(student.grad.double(), other.grad, atol=tolerance)


@pytest.mark.usefixtures("chunk")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_and_its_gradient(dtype):
    student, targets = logits(dtype=dtype).requires_grad_(), torch.randint(0, 50, (9,))
    cross_entropy(student, targets).mean().backward()
    other = student.detach().double().requires_grad_()
    expected = F.cross_entropy(other, targets)
    expected.backward()
    assert torch.allclose(cross_entropy(student, targets).mean().double(), expected, rtol=1e-5)
    assert torch.allclose(student.grad.double(), other.grad, atol=1e-6 if dtype is torch.float32 else 2e-3)


def test_equal_logits_diverge_by_nothing_and_large_ones_do_not_overflow():
    x = logits(scale=1e4)
    assert float(forward_kl(x, x).abs().max()) < 1e-2
    assert bool(torch.isfinite(forward_kl(x, logits())).all())


def test_no_gradient_reaches_the_teacher():
    student, teacher = logits().requires_grad_(), logits().requires_grad_()
    forward_kl(student, teacher).sum().backward()
    assert teacher.grad is None


def test_a_loss_is_the_weighted_sum_of_means():
    student, teacher, ids = torch.randn(2, 6, 50), torch.randn(2, 6, 50), torch.randint(0, 50, (2, 6))
    parts = Loss(kl=2.0, ce=0.5)(student, teacher, ids)
    kl = F.kl_div(student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none").sum(-1).mean()
    ce = F.cross_entropy(student[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert torch.allclose(parts["loss"], 2 * kl + 0.5 * ce, rtol=1e-5)
    assert torch.allclose(parts["ce"], ce, rtol=1e-5)
    assert set(Loss(kl=0.0, ce=1.0)(student, None, ids)) == {"loss", "ce"}


@pytest.mark.parametrize("weights", [{"kl": 0.0}, {"kl": -1.0, "ce": 2.0}])
def test_weights_that_mean_nothing_are_refused(weights):
    with pytest.raises(ValueError, match="weights are not negative"):
        Loss(**weights)
