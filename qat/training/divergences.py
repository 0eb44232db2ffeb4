"""Divergences of next-token distributions, token by token, with their gradients in closed form.

Logits of N tokens are `[N, V]`. P = softmax(teacher) has no gradient; Q = softmax(student) has one with respect to the
student's logits s. Everything is fp32 inside, in pieces of the vocabulary, so no fp32 copy of the logits ever exists.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from qat.training.losses import Loss

PIECE = 2**22  # logits in fp32 at once, 16 MiB: on a CPU a quarter faster than 2**24, which leaves its caches
NO_TARGET = -1


def per_token(loss: Loss, student: Tensor, teacher: Tensor | None, targets: Tensor) -> dict[str, Tensor]:
    """Every part of the loss for every token, unweighted: fp32 `[N]` by name.

    Args:
        loss: Which parts.
        student: Logits `[N, V]`.
        teacher: Logits `[N, V]`; needed where the loss distils.
        targets: The next token of each, int64 `[N]`; `NO_TARGET` where there is none.
    """
    parts = {}
    if loss.distils:
        assert teacher is not None, "distillation needs the teacher's logits"
        if loss.kl:
            parts["kl"] = forward_kl(student, teacher)
        if loss.reverse_kl:
            parts["reverse_kl"] = reverse_kl(student, teacher)
        if loss.jsd:
            parts["jsd"] = jsd(student, teacher, loss.beta)
    if loss.ce:
        parts["ce"] = cross_entropy(student, targets)
    return parts


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(P || Q) in nats, fp32 `[N]`; d/ds = q - p."""
    return _ForwardKL.apply(student, teacher)


def reverse_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(Q || P) in nats, fp32 `[N]`; d/ds = q (log q - log p - KL(Q || P))."""
    return _ReverseKL.apply(student, teacher)


def jsd(student: Tensor, teacher: Tensor, beta: float) -> Tensor:
    """beta KL(P || M) + (1 - beta) KL(Q || M), M = beta P + (1 - beta) Q, in nats, fp32 `[N]`.

    arXiv:2306.13649, eq. 1. d/ds = (1 - beta) q (log q - log m - KL(Q || M)): what M's own movement contributes
    cancels between the two terms.
    """
    return _JSD.apply(student, teacher, beta)


def cross_entropy(student: Tensor, targets: Tensor) -> Tensor:
    """-log Q(target) in nats, fp32 `[N]`, 0 where there is no target; d/ds = q - onehot(target)."""
    return _CrossEntropy.apply(student, targets)


def logsumexp(logits: Tensor) -> Tensor:
    """log sum exp over the vocabulary in fp32, piece by piece: `[N, V]` -> `[N]`."""
    parts = [piece.float().logsumexp(-1) for (piece,) in _pieces(logits)]
    return torch.stack(parts, -1).logsumexp(-1)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same piece of the vocabulary of each `[N, V]`, PIECE elements of each at once."""
    width = max(1, PIECE // len(tensors[0]))
    return zip(*(tensor.split(width, -1) for tensor in tensors), strict=True)


def _log_softmax(logits: Tensor, lse: Tensor) -> Tensor:
    return logits.float() - lse[:, None]


def _log_mixture(log_p: Tensor, log_q: Tensor, beta: float) -> Tensor:
    return torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))


class _ForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        lse_s, lse_t = logsumexp(student), logsumexp(teacher)
        total = torch.zeros_like(lse_s)
        for s, t in _pieces(student, teacher):
            log_p = _log_softmax(t, lse_t)
            total += (log_p.exp() * (log_p - _log_softmax(s, lse_s))).sum(-1)
        ctx.save_for_backward(student, teacher, lse_s, lse_t)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        student, teacher, lse_s, lse_t = ctx.saved_tensors
        result = torch.empty_like(student)
        for out, s, t in _pieces(result, student, teacher):
            q = _log_softmax(s, lse_s).exp_()
            out.copy_(q.sub_(_log_softmax(t, lse_t).exp_()).mul_(grads[0][:, None]))
        return result, None


class _ReverseKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        lse_s, lse_t = logsumexp(student), logsumexp(teacher)
        total = torch.zeros_like(lse_s)
        for s, t in _pieces(student, teacher):
            log_q = _log_softmax(s, lse_s)
            total += (log_q.exp() * (log_q - _log_softmax(t, lse_t))).sum(-1)
        ctx.save_for_backward(student, teacher, lse_s, lse_t, total)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        student, teacher, lse_s, lse_t, total = ctx.saved_tensors
        result = torch.empty_like(student)
        for out, s, t in _pieces(result, student, teacher):
            log_q = _log_softmax(s, lse_s)
            ratio = (log_q - _log_softmax(t, lse_t)).sub_(total[:, None])
            out.copy_(log_q.exp_().mul_(ratio).mul_(grads[0][:, None]))
        return result, None


class _JSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, beta: float) -> Tensor:
        lse_s, lse_t = logsumexp(student), logsumexp(teacher)
        of_p, of_q = torch.zeros_like(lse_s), torch.zeros_like(lse_s)
        for s, t in _pieces(student, teacher):
            log_p, log_q = _log_softmax(t, lse_t), _log_softmax(s, lse_s)
            log_m = _log_mixture(log_p, log_q, beta)
            of_p += (log_p.exp() * (log_p - log_m)).sum(-1)
            of_q += (log_q.exp() * (log_q - log_m)).sum(-1)
        ctx.save_for_backward(student, teacher, lse_s, lse_t, of_q)
        ctx.beta = beta
        return of_p.mul_(beta).add_(of_q, alpha=1 - beta)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        student, teacher, lse_s, lse_t, of_q = ctx.saved_tensors
        result, scale = torch.empty_like(student), grads[0][:, None] * (1 - ctx.beta)
        for out, s, t in _pieces(result, student, teacher):
            log_q = _log_softmax(s, lse_s)
            ratio = (log_q - _log_mixture(_log_softmax(t, lse_t), log_q, ctx.beta)).sub_(of_q[:, None])
            out.copy_(log_q.exp_().mul_(ratio).mul_(scale))
        return result, None, None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, targets: Tensor) -> Tensor:
        lse = logsumexp(student)
        ctx.save_for_backward(student, targets, lse)
        nll = lse - student.gather(-1, targets.clamp(min=0)[:, None]).squeeze(-1).float()
        return nll.masked_fill_(targets == NO_TARGET, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        student, targets, lse = ctx.saved_tensors
        result = torch.empty_like(student)
        scale = grads[0].masked_fill(targets == NO_TARGET, 0.0)[:, None]
        for out, s in _pieces(result, student):
            out.copy_(_log_softmax(s, lse).exp_().mul_(scale))
        result.scatter_add_(-1, targets.clamp(min=0)[:, None], -scale.to(result.dtype))
        return result, None
