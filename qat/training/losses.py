"""Losses over next-token logits. fp32 inside, chunked over the vocabulary: no fp32 copy of the logits ever exists."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK = 8192  # vocabulary entries in fp32 at once


@dataclass(frozen=True)
class Loss:
    """`kl * KL(teacher || student) + ce * cross-entropy`, each the mean over its tokens.

    Attributes:
        kl: Weight of forward KL at T = 1 to the full-precision teacher, over every position (arXiv:1503.02531).
        ce: Weight of cross-entropy with the next token.

    Raises:
        ValueError: A weight is negative, or both are 0.
    """

    kl: float = 1.0
    ce: float = 0.0

    def __post_init__(self) -> None:
        if self.kl < 0 or self.ce < 0 or self.kl + self.ce == 0:
            raise ValueError(f"loss kl={self.kl}, ce={self.ce}: weights are not negative, and one of them is positive")

    def __call__(self, student: Tensor, teacher: Tensor | None, ids: Tensor) -> dict[str, Tensor]:
        """The loss and its parts, `{"loss", "kl", "ce"}` as far as they are asked for.

        Args:
            student: Logits `[B, T, V]`.
            teacher: Logits `[B, T, V]`; needed where `kl` is positive.
            ids: Token ids `[B, T]`.
        """
        parts = {}
        if self.kl:
            assert teacher is not None, "distillation needs the teacher's logits"
            parts["kl"] = forward_kl(student.flatten(0, 1), teacher.flatten(0, 1)).mean()
        if self.ce:
            parts["ce"] = cross_entropy(student[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).mean()
        total = sum(getattr(self, name) * value for name, value in parts.items())
        assert isinstance(total, Tensor)
        return {"loss": total, **parts}


def forward_kl(student: Tensor, teacher: Tensor) -> Tensor:
    """KL(teacher || student) of each token in nats: two logits `[N, V]` -> fp32 `[N]`; no gradient for the teacher."""
    return _ForwardKL.apply(student, teacher)


def cross_entropy(student: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target in nats: logits `[N, V]`, int64 `[N]` -> fp32 `[N]`."""
    return _CrossEntropy.apply(student, targets)


def logsumexp(logits: Tensor) -> Tensor:
    """log sum exp over the vocabulary in fp32, chunk by chunk: `[N, V]` -> `[N]`."""
    parts = [chunk.float().logsumexp(-1) for chunk in logits.split(CHUNK, -1)]
    return torch.stack(parts, -1).logsumexp(-1)


class _ForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor) -> Tensor:
        lse_s, lse_t = logsumexp(student), logsumexp(teacher)
        total = torch.zeros_like(lse_s)
        for s, t in zip(student.split(CHUNK, -1), teacher.split(CHUNK, -1), strict=True):
            log_p = t.float() - lse_t[:, None]
            total += (log_p.exp() * (log_p - (s.float() - lse_s[:, None]))).sum(-1)
        ctx.save_for_backward(student, teacher, lse_s, lse_t)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        student, teacher, lse_s, lse_t = ctx.saved_tensors
        result = torch.empty_like(student)
        for out, s, t in zip(*(x.split(CHUNK, -1) for x in (result, student, teacher)), strict=True):
            q = (s.float() - lse_s[:, None]).exp_()
            out.copy_(q.sub_((t.float() - lse_t[:, None]).exp_()).mul_(grads[0][:, None]))
        return result, None


class _CrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, targets: Tensor) -> Tensor:
        lse = logsumexp(student)
        ctx.save_for_backward(student, targets, lse)
        return lse - student.gather(-1, targets[:, None]).squeeze(-1).float()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        student, targets, lse = ctx.saved_tensors
        result = torch.empty_like(student)
        for out, s in zip(result.split(CHUNK, -1), student.split(CHUNK, -1), strict=True):
            out.copy_((s.float() - lse[:, None]).exp_().mul_(grads[0][:, None]))
        result.scatter_add_(-1, targets[:, None], -grads[0][:, None].to(result.dtype))
        return result, None
