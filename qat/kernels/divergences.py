"""Divergences of next-token distributions, token by token, and their gradients in closed form. The reference.

    P = softmax(teacher), Q = softmax(student), M = beta P + (1 - beta) Q

    kl                       KL(P || Q), of any two
    jsd                      beta KL(P || M) + (1 - beta) KL(Q || M)
    cross_entropy            -log Q(target)
    kl_gradient              scale (q - p)                           KL(P || Q)'s
    mixed_gradient           scale q (log q - log m - KL(Q || M))    with beta = 1 KL(Q || P)'s; the JSD's over 1 - beta
    cross_entropy_gradient   scale (q - onehot(target))

Logits are `[N, V]` of any floating dtype, a value is fp32 `[N]`, in nats; it comes with what its gradient needs besides
the logits, such as `lse`, the log sum exp of a token's logits. Gradients are with respect to the student's logits,
`[N, V]` in their dtype, and rounded to it once; `scale` is fp32 `[N]`, a token's own.

Everything is fp32 inside, in pieces of the vocabulary, so no fp32 copy of the logits ever exists. On CUDA the twin of
the same name runs instead (`triton/divergences.py`); the reference is then each function's `__wrapped__`.
"""

import math
from collections.abc import Callable, Iterator
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

PIECE = 2**22  # logits in fp32 at once, 16 MiB: on a CPU a quarter faster than 2**24, which leaves its caches
NO_TARGET = -1

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def twinned(reference: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """The reference, or the twin of its name if the first argument, logits, lies on CUDA."""

    @wraps(reference)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        logits = args[0]
        assert isinstance(logits, Tensor)
        if not logits.is_cuda:
            return reference(*args, **kwargs)
        from qat.kernels.triton import divergences as twin  # it imports this module, and Triton

        return getattr(twin, reference.__name__)(*args, **kwargs)

    return run


@twinned
def kl(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL(P || Q) of P = softmax(p) and Q = softmax(q), and both lse."""
    lse_p, lse_q = logsumexp(p), logsumexp(q)
    total = torch.zeros_like(lse_p)
    for piece_p, piece_q in _pieces(p, q):
        log_p = _log_softmax(piece_p, lse_p)
        total += (log_p.exp() * (log_p - _log_softmax(piece_q, lse_q))).sum(-1)
    return total, lse_p, lse_q


@twinned
def jsd(student: Tensor, teacher: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """beta KL(P || M) + (1 - beta) KL(Q || M), KL(Q || M) alone, the student's lse and the teacher's."""
    lse_s, lse_t = logsumexp(student), logsumexp(teacher)
    of_p, of_q = torch.zeros_like(lse_s), torch.zeros_like(lse_s)
    for s, t in _pieces(student, teacher):
        log_p, log_q = _log_softmax(t, lse_t), _log_softmax(s, lse_s)
        log_m = _log_mixture(log_p, log_q, beta)
        of_p += (log_p.exp() * (log_p - log_m)).sum(-1)
        of_q += (log_q.exp() * (log_q - log_m)).sum(-1)
    return of_p.mul_(beta).add_(of_q, alpha=1 - beta), of_q, lse_s, lse_t


@twinned
def cross_entropy(student: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """-log Q(target), 0 where the target (int64 `[N]`) is `NO_TARGET`, and the lse."""
    lse = logsumexp(student)
    nll = lse - student.gather(-1, targets.clamp(min=0)[:, None]).squeeze(-1).float()
    return nll.masked_fill_(targets == NO_TARGET, 0.0), lse


@twinned
def kl_gradient(student: Tensor, teacher: Tensor, lse_s: Tensor, lse_t: Tensor, scale: Tensor) -> Tensor:
    """scale (q - p)."""
    result = torch.empty_like(student)
    for out, s, t in _pieces(result, student, teacher):
        q = _log_softmax(s, lse_s).exp_()
        out.copy_(q.sub_(_log_softmax(t, lse_t).exp_()).mul_(scale[:, None]))
    return result


@twinned
def mixed_gradient(
    student: Tensor, teacher: Tensor, lse_s: Tensor, lse_t: Tensor, of_q: Tensor, scale: Tensor, beta: float
) -> Tensor:
    """scale q (log q - log m - of_q); `of_q`: KL(Q || M). With beta = 1, M is P."""
    result = torch.empty_like(student)
    for out, s, t in _pieces(result, student, teacher):
        log_p, log_q = _log_softmax(t, lse_t), _log_softmax(s, lse_s)
        log_m = log_p if beta == 1 else _log_mixture(log_p, log_q, beta)
        ratio = (log_q - log_m).sub_(of_q[:, None])
        out.copy_(log_q.exp_().mul_(ratio).mul_(scale[:, None]))
    return result


@twinned
def cross_entropy_gradient(student: Tensor, targets: Tensor, lse: Tensor, scale: Tensor) -> Tensor:
    """scale (q - onehot(target)), 0 where there is no target."""
    result, index = torch.empty_like(student), targets.clamp(min=0)[:, None]
    scale = scale.masked_fill(targets == NO_TARGET, 0.0)[:, None]
    for out, s in _pieces(result, student):
        out.copy_(_log_softmax(s, lse).exp_().mul_(scale))
    q = _log_softmax(student.gather(-1, index), lse).exp_()
    return result.scatter_(-1, index, q.sub_(1).mul_(scale).to(result.dtype))


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
