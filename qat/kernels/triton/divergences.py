"""Divergences on a GPU: a launch where the reference makes dozens. Signatures are its own.

A value is one program a token, which goes over the vocabulary once and carries, besides the sums, the largest logit so
far: when that rises, what was summed is rescaled. A gradient is one program for every BLOCK logits. What is read and
written for a logit, in its dtype (bf16: 2 bytes each):

    kl              2 reads        kl_gradient, mixed_gradient    2 reads, 1 write
    jsd             4 reads        cross_entropy_gradient         1 read, 1 write
    cross_entropy   1 read

KL needs no log sum exp beforehand: with u, v the distances of p's and q's logits from the largest of each,

    KL(P || Q) = sum e^u (u - v) / sum e^u + log(sum e^v / sum e^u)

A row's elements are adjacent, or the logits are copied first; rows may lie anywhere. Sums are fp32, in an order that V
alone decides, so two runs are equal bit for bit. Nothing waits for the GPU or depends on values, so a CUDA graph may
capture any call whose like, in dtypes and strides, has run before: the first one compiles.

Bounds, for finite logits, V up to 2**17 and against exact arithmetic. L is a token's largest |logit|, D its largest
|log q - log p|, r = 2**-18 + 2**-21 L the relative error of a probability; the reference keeps to them as well.

    kl, jsd, KL(Q || M)       r + 2**-18 D
    cross_entropy, lse        r
    kl_gradient               |scale| (p + q) r             each gradient: and the rounding to the student's dtype
    mixed_gradient            |scale| q (1 + D) r
    cross_entropy_gradient    |scale| q r                   at the target 2**-23 |scale| more

NaN gives NaN for its token, and so does a target outside the vocabulary. -inf is for the student alone, as in the
reference: a token of no probability, whose cross-entropy gradient is 0.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from qat.kernels.divergences import NO_TARGET

BLOCK, WARPS = 2048, 8  # logits of each tensor that a program holds at once, 8 a thread: one load of 16 bytes in bf16
# Of no logit yet: finite, for inf - inf is NaN, and so low that e^(LOWEST - x) is 0.
LOWEST = tl.constexpr(-1e38)
NOWHERE = tl.constexpr(NO_TARGET)


def kl(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """KL(P || Q) and both lse."""
    p, q = _rows(p), _rows(q)
    value, lse_p, lse_q = _per_token(p, 3)
    with torch.cuda.device_of(p):
        _kl[(len(p),)](p, q, value, lse_p, lse_q, p.stride(0), q.stride(0), p.shape[1], _block(p), num_warps=WARPS)
    return value, lse_p, lse_q


def jsd(student: Tensor, teacher: Tensor, beta: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The JSD, KL(Q || M), the student's lse and the teacher's."""
    s, t = _rows(student), _rows(teacher)
    (_, lse_s, lse_t), (value, of_q) = kl(s, t), _per_token(s, 2)
    tensors, sizes = (s, t, lse_s, lse_t, value, of_q), (s.stride(0), t.stride(0), s.shape[1])
    with torch.cuda.device_of(s):
        _jsd[(len(s),)](*tensors, beta, math.log(beta), math.log1p(-beta), *sizes, _block(s), num_warps=WARPS)
    return value, of_q, lse_s, lse_t


def cross_entropy(student: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """-log Q(target), 0 where there is none, and the lse."""
    s, (value, lse) = _rows(student), _per_token(student, 2)
    sizes = (s.stride(0), targets.stride(0), s.shape[1])
    with torch.cuda.device_of(s):
        _cross_entropy[(len(s),)](s, targets, value, lse, *sizes, _block(s), num_warps=WARPS)
    return value, lse


def kl_gradient(student: Tensor, teacher: Tensor, lse_s: Tensor, lse_t: Tensor, scale: Tensor) -> Tensor:
    """scale (q - p)."""
    s, t = _rows(student), _rows(teacher)
    result, sizes = _like(s), (s.stride(0), t.stride(0), scale.stride(0), s.shape[1])
    with torch.cuda.device_of(s):
        _kl_gradient[_grid(s)](s, t, lse_s, lse_t, scale, result, *sizes, _block(s), num_warps=WARPS)
    return result


def mixed_gradient(
    student: Tensor, teacher: Tensor, lse_s: Tensor, lse_t: Tensor, of_q: Tensor, scale: Tensor, beta: float
) -> Tensor:
    """scale q (log q - log m - of_q)."""
    s, t, mixes = _rows(student), _rows(teacher), beta != 1
    logs = (math.log(beta), math.log1p(-beta) if mixes else 0.0)
    result, sizes = _like(s), (s.stride(0), t.stride(0), scale.stride(0), s.shape[1])
    tensors = (s, t, lse_s, lse_t, of_q, scale, result)
    with torch.cuda.device_of(s):
        _mixed_gradient[_grid(s)](*tensors, *logs, *sizes, mixes, _block(s), num_warps=WARPS)
    return result


def cross_entropy_gradient(student: Tensor, targets: Tensor, lse: Tensor, scale: Tensor) -> Tensor:
    """scale (q - onehot(target))."""
    s = _rows(student)
    result, sizes = _like(s), (s.stride(0), targets.stride(0), scale.stride(0), s.shape[1])
    with torch.cuda.device_of(s):
        _cross_entropy_gradient[_grid(s)](s, targets, lse, scale, result, *sizes, _block(s), num_warps=WARPS)
    return result


def _rows(logits: Tensor) -> Tensor:
    return logits if logits.stride(1) == 1 else logits.contiguous()


def _per_token(logits: Tensor, count: int) -> tuple[Tensor, ...]:
    return torch.empty((count, len(logits)), dtype=torch.float32, device=logits.device).unbind()


def _like(logits: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


def _block(logits: Tensor) -> int:
    return min(BLOCK, triton.next_power_of_2(logits.shape[1]))


def _grid(logits: Tensor) -> tuple[int]:
    return (len(logits) * triton.cdiv(logits.shape[1], _block(logits)),)


@triton.jit
def _logits(pointer, at, inside):  # type: ignore[no-untyped-def]
    """Logits in fp32, -inf beyond the vocabulary."""
    return tl.load(pointer + at, inside, float("-inf")).to(tl.float32)


@triton.jit
def _log_mixture(log_p, log_q, log_beta, log_rest):  # type: ignore[no-untyped-def]
    a, b = log_p + log_beta, log_q + log_rest
    return tl.maximum(a, b) + tl.log(1 + tl.exp(-tl.abs(a - b)))


@triton.jit
def _kl(p_at, q_at, value, lse_p, lse_q, p_stride, q_stride, V, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    token, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    top_p, top_q = LOWEST, LOWEST
    sum_p, sum_q = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    weighted = tl.zeros([BLOCK], tl.float32)  # sums of e^u (u - v), a lane's own, as are the others
    for start in range(0, V, BLOCK):
        inside = start + lane < V
        p = _logits(p_at + token * p_stride, start + lane, inside)
        q = _logits(q_at + token * q_stride, start + lane, inside)
        next_p, next_q = tl.maximum(top_p, tl.max(p)), tl.maximum(top_q, tl.max(q))
        rise_p, rise_q = next_p - top_p, next_q - top_q
        top_p, top_q = next_p, next_q
        u, v = p - top_p, q - top_q
        e = tl.exp(u)
        # What was summed gets another u - v as the tops rise, and less weight.
        weighted = (weighted + sum_p * (rise_q - rise_p)) * tl.exp(-rise_p) + tl.where(inside, e * (u - v), 0.0)
        sum_p = sum_p * tl.exp(-rise_p) + e
        sum_q = sum_q * tl.exp(-rise_q) + tl.exp(v)
    all_p, all_q = tl.sum(sum_p), tl.sum(sum_q)
    tl.store(value + token, tl.sum(weighted) / all_p + tl.log(tl.div_rn(all_q, all_p)))  # exactly 0 of equal logits
    tl.store(lse_p + token, top_p + tl.log(all_p))
    tl.store(lse_q + token, top_q + tl.log(all_q))


@triton.jit
def _jsd(  # type: ignore[no-untyped-def]
    s_at, t_at, lse_s, lse_t, value, mean, beta, log_beta, log_rest, s_stride, t_stride, V, BLOCK: tl.constexpr
):
    token, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    of_p, of_q = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        inside = start + lane < V
        log_q = _logits(s_at + token * s_stride, start + lane, inside) - tl.load(lse_s + token)
        log_p = _logits(t_at + token * t_stride, start + lane, inside) - tl.load(lse_t + token)
        log_m = _log_mixture(log_p, log_q, log_beta, log_rest)
        of_p += tl.where(inside, tl.exp(log_p) * (log_p - log_m), 0.0)
        of_q += tl.where(inside, tl.exp(log_q) * (log_q - log_m), 0.0)
    from_q = tl.sum(of_q)
    tl.store(value + token, beta * tl.sum(of_p) + (1 - beta) * from_q)
    tl.store(mean + token, from_q)


@triton.jit
def _cross_entropy(  # type: ignore[no-untyped-def]
    s_at, targets, value, lse, s_stride, target_stride, V, BLOCK: tl.constexpr
):
    token, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    s_at += token * s_stride
    top, total = LOWEST, tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        s = _logits(s_at, start + lane, start + lane < V)
        higher = tl.maximum(top, tl.max(s))
        total = total * tl.exp(top - higher) + tl.exp(s - higher)
        top = higher
    log = tl.log(tl.sum(total))
    target = tl.load(targets + token * target_stride)
    chosen = tl.load(s_at + target, (target >= 0) & (target < V), float("nan")).to(tl.float32)
    tl.store(value + token, tl.where(target == NOWHERE, 0.0, top - chosen + log))
    tl.store(lse + token, top + log)


@triton.jit
def _place(V, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """A gradient's token, its places in the vocabulary, and which of them exist."""
    blocks = tl.cdiv(V, BLOCK)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return (tl.program_id(0) // blocks).to(tl.int64), at, at < V


@triton.jit
def _kl_gradient(  # type: ignore[no-untyped-def]
    s_at, t_at, lse_s, lse_t, scales, result, s_stride, t_stride, scale_stride, V, BLOCK: tl.constexpr
):
    token, at, inside = _place(V, BLOCK)
    q = tl.exp(_logits(s_at + token * s_stride, at, inside) - tl.load(lse_s + token))
    p = tl.exp(_logits(t_at + token * t_stride, at, inside) - tl.load(lse_t + token))
    tl.store(result + token * V + at, (q - p) * tl.load(scales + token * scale_stride), inside)


@triton.jit
def _mixed_gradient(  # type: ignore[no-untyped-def]
    s_at, t_at, lse_s, lse_t, means, scales, result, log_beta, log_rest, s_stride, t_stride, scale_stride, V,
    MIXES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, at, inside = _place(V, BLOCK)
    log_q = _logits(s_at + token * s_stride, at, inside) - tl.load(lse_s + token)
    log_m = _logits(t_at + token * t_stride, at, inside) - tl.load(lse_t + token)
    if MIXES:
        log_m = _log_mixture(log_m, log_q, log_beta, log_rest)
    slope = tl.exp(log_q) * (log_q - log_m - tl.load(means + token))
    tl.store(result + token * V + at, slope * tl.load(scales + token * scale_stride), inside)


@triton.jit
def _cross_entropy_gradient(  # type: ignore[no-untyped-def]
    s_at, targets, lse, scales, result, s_stride, target_stride, scale_stride, V, BLOCK: tl.constexpr
):
    token, at, inside = _place(V, BLOCK)
    q = tl.exp(_logits(s_at + token * s_stride, at, inside) - tl.load(lse + token))
    target = tl.load(targets + token * target_stride)
    scale = tl.where(target == NOWHERE, 0.0, tl.load(scales + token * scale_stride))
    tl.store(result + token * V + at, tl.where(at == target, q - 1, q) * scale, inside)
