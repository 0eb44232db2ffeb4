"""Divergences of next-token distributions with autograd, token by token: what `kernels/divergences.py` computes.

Logits of N tokens are `[N, V]`. P = softmax(teacher) has no gradient; Q = softmax(student) has one with respect to the
student's logits s.
"""

from typing import Any

import torch
from torch import Tensor

from qat.kernels import divergences as kernels
from qat.training.losses import Loss


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


class _ForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        value, lse_t, lse_s = kernels.kl(teacher, student)
        ctx.save_for_backward(student, teacher, lse_s, lse_t)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        student, teacher, lse_s, lse_t = ctx.saved_tensors
        return kernels.kl_gradient(student, teacher, lse_s, lse_t, grads[0]), None


class _ReverseKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        value, lse_s, lse_t = kernels.kl(student, teacher)
        ctx.save_for_backward(student, teacher, lse_s, lse_t, value)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        student, teacher, lse_s, lse_t, value = ctx.saved_tensors
        return kernels.mixed_gradient(student, teacher, lse_s, lse_t, value, grads[0], 1.0), None


class _JSD(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, beta: float) -> Tensor:
        value, of_q, lse_s, lse_t = kernels.jsd(student, teacher, beta)
        ctx.save_for_backward(student, teacher, lse_s, lse_t, of_q)
        ctx.beta = beta
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (student, teacher, lse_s, lse_t, of_q), scale = ctx.saved_tensors, grads[0] * (1 - ctx.beta)
        return kernels.mixed_gradient(student, teacher, lse_s, lse_t, of_q, scale, ctx.beta), None, None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, targets: Tensor) -> Tensor:
        value, lse = kernels.cross_entropy(student, targets)
        ctx.save_for_backward(student, targets, lse)
        return value

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        student, targets, lse = ctx.saved_tensors
        return kernels.cross_entropy_gradient(student, targets, lse, grads[0]), None
