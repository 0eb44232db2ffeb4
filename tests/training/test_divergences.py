"""Divergences against their definitions in float64, values and gradients by autograd; pieces change nothing."""

import pytest
import torch
import torch.nn.functional as F

from qat.kernels import divergences
from qat.kernels.divergences import NO_TARGET
from qat.training.divergences import cross_entropy, forward_kl, jsd, per_token, reverse_kl
from qat.training.losses import Loss

N, V = 9, 50


@pytest.fixture(params=[N * 7, N * 50, 10_000])
def piece(request, monkeypatch):
    monkeypatch.setattr(divergences, "PIECE", request.param)


def logits(dtype=torch.float32, scale=3.0):
    return (torch.randn(N, V) * scale).to(dtype)


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def mixed(beta):
    """arXiv:2306.13649, eq. 1, as it is written there."""

    def definition(log_q, log_p):
        log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
        return beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)

    return definition


DIVERGENCES = {
    "forward": (forward_kl, lambda log_q, log_p: kl(log_p, log_q)),
    "reverse": (reverse_kl, lambda log_q, log_p: kl(log_q, log_p)),
    **{f"jsd {b}": (lambda s, t, b=b: jsd(s, t, b), mixed(b)) for b in (0.1, 0.5, 0.9)},
}


@pytest.mark.usefixtures("piece")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_value_and_gradient_against_autograd_in_float64(name, dtype):
    ours, definition = DIVERGENCES[name]
    student, teacher = logits(dtype).requires_grad_(), logits(dtype).requires_grad_()
    weights = torch.rand(N)
    found = ours(student, teacher)
    (found * weights).sum().backward()
    other = student.detach().double().requires_grad_()
    log_q, log_p = other.log_softmax(-1), teacher.detach().double().log_softmax(-1)
    expected = definition(log_q, log_p)
    (expected * weights).sum().backward()
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert student.grad.dtype == dtype
    rounding = 4 * torch.finfo(torch.float32).eps * float((log_q - log_p).detach().abs().max())
    stored = 0.0 if dtype is torch.float32 else 2**-8  # the gradient is rounded once to the dtype of the logits
    assert torch.allclose(student.grad.double(), other.grad, rtol=stored, atol=rounding)
    assert teacher.grad is None


@pytest.mark.usefixtures("piece")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_entropy_and_its_gradient(dtype):
    student, targets = logits(dtype).requires_grad_(), torch.randint(0, V, (N,))
    targets[[3, 8]] = NO_TARGET
    cross_entropy(student, targets).sum().backward()
    other = student.detach().double().requires_grad_()
    expected = F.cross_entropy(other, targets, ignore_index=NO_TARGET, reduction="none")
    expected.sum().backward()
    assert torch.allclose(cross_entropy(student, targets).double(), expected, rtol=1e-5)
    assert torch.allclose(student.grad.double(), other.grad, atol=1e-6 if dtype is torch.float32 else 2e-3)
    assert not student.grad[[3, 8]].any()


@pytest.mark.parametrize("name", DIVERGENCES)
def test_equal_logits_diverge_by_nothing_and_large_ones_do_not_overflow(name):
    ours, _ = DIVERGENCES[name]
    x, far = logits(scale=1e4).requires_grad_(), logits(scale=1e4)
    assert float(ours(x, x.detach()).detach().abs().max()) < 1e-2
    value = ours(x, far)
    value.sum().backward()
    assert bool(torch.isfinite(value).all())
    assert bool(torch.isfinite(x.grad).all())


def test_jsd_is_bounded_and_tends_to_both_kls():
    student, teacher = logits(), logits()
    beta = 0.3
    bound = -(beta * torch.tensor(beta).log() + (1 - beta) * torch.tensor(1 - beta).log())  # the entropy of the mixing
    assert float(jsd(student * 100, teacher * 100, beta).max()) <= float(bound) * (1 + 1e-6)
    student, teacher, near = student / 8, teacher / 8, 1e-3
    assert torch.allclose(jsd(student, teacher, near) / near, forward_kl(student, teacher), rtol=1e-2)
    assert torch.allclose(jsd(student, teacher, 1 - near) / near, reverse_kl(student, teacher), rtol=1e-2)


def test_a_loss_has_its_parts_and_no_other():
    student, teacher, targets = logits(), logits(), torch.randint(0, V, (N,))
    parts = per_token(Loss(kl=0.5, reverse_kl=1.0, jsd=2.0, beta=0.2, ce=1.0), student, teacher, targets)
    assert list(parts) == ["kl", "reverse_kl", "jsd", "ce"]
    assert torch.equal(parts["reverse_kl"], reverse_kl(student, teacher))
    assert torch.equal(parts["jsd"], jsd(student, teacher, 0.2))
    assert list(per_token(Loss(kl=0.0, ce=1.0), student, None, targets)) == ["ce"]
