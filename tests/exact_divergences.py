"""Divergences and their gradients in float64, from their definitions, and the bounds that every kernel keeps to."""

import math

import torch

from qat.kernels.divergences import NO_TARGET

SHAPES = [(1, 7), (3, 7), (1, 49152), (3, 50257)]
DTYPES = [torch.float32, torch.bfloat16]
BETA = 0.3
FLOOR = 1e-37  # below it fp32 has no full precision


def case(n, v, dtype, scale=3.0, device="cpu"):
    """Student, teacher, targets and scales of n tokens."""
    student, teacher = ((torch.randn(n, v) * scale).to(dtype) for _ in range(2))
    targets = torch.randint(0, v, (n,))
    targets[1::2] = NO_TARGET
    return tuple(tensor.to(device) for tensor in (student, teacher, targets, torch.rand(n) + 0.5))


def run(kernels, student, teacher, targets, scale, beta=BETA):
    """What every operation of a module, or its likes, makes of a case: by name."""
    kl, lse_p, lse_q = kernels.kl(teacher, student)
    reverse = kernels.kl(student, teacher)[0]
    jsd, of_q, lse_s, lse_t = kernels.jsd(student, teacher, beta)
    ce, lse = kernels.cross_entropy(student, targets)
    return {
        **{"kl": kl, "reverse_kl": reverse, "jsd": jsd, "of_q": of_q, "ce": ce},
        **{"lse_p": lse_p, "lse_t": lse_t, "lse_q": lse_q, "lse_s": lse_s, "lse": lse},
        "kl_gradient": kernels.kl_gradient(student, teacher, lse_s, lse_t, scale),
        "reverse_gradient": kernels.mixed_gradient(student, teacher, lse_s, lse_t, reverse, scale, 1.0),
        "mixed_gradient": kernels.mixed_gradient(student, teacher, lse_s, lse_t, of_q, scale, beta),
        "ce_gradient": kernels.cross_entropy_gradient(student, targets, lse, scale),
    }


def exact(student, teacher, targets, scale, beta=BETA, ulps=0.5):
    """The same in float64, each with its bound: `{name: (value, bound)}`; `ulps`: of the rounding of gradients."""
    s, t, scale = student.double(), teacher.double(), scale.double()[:, None]
    log_q, log_p = s.log_softmax(-1), t.log_softmax(-1)
    log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
    q, p = log_q.exp(), log_p.exp()

    def kl(log_a, log_b):
        return (log_a.exp() * (log_a - log_b)).sum(-1)

    far = (log_q - log_p).abs().amax(-1)
    near = 2**-18 + 2**-21 * torch.maximum(s.abs(), t.abs()).amax(-1)  # relative error of a probability
    value, column = near + 2**-18 * far, near[:, None]
    of_q = kl(log_q, log_m)
    index, absent = targets.clamp(min=0)[:, None], targets == NO_TARGET
    onehot = torch.zeros_like(q).scatter_(-1, index, 1.0)
    given = scale.masked_fill(absent[:, None], 0.0)
    lse_s, lse_t = s.logsumexp(-1), t.logsumexp(-1)
    of_gradients = {
        "kl_gradient": (scale * (q - p), scale * (q + p) * column),
        "reverse_gradient": (
            scale * q * (log_q - log_p - kl(log_q, log_p)[:, None]),
            scale * q * (1 + far[:, None]) * column,
        ),
        "mixed_gradient": (scale * q * (log_q - log_m - of_q[:, None]), scale * q * (1 + far[:, None]) * column),
        "ce_gradient": (given * (q - onehot), given * (q * column + 2**-23 * onehot)),
    }
    rounding = torch.finfo(student.dtype).eps * ulps
    return {
        "kl": (kl(log_p, log_q), value),
        "reverse_kl": (kl(log_q, log_p), value),
        "jsd": (beta * kl(log_p, log_m) + (1 - beta) * of_q, value),
        "of_q": (of_q, value),
        "ce": ((-log_q.gather(-1, index).squeeze(-1)).masked_fill(absent, 0.0), near),
        **dict.fromkeys(("lse_q", "lse_s", "lse"), (lse_s, near)),
        **dict.fromkeys(("lse_p", "lse_t"), (lse_t, near)),
        **{n: (g, (1 + rounding) * bound + rounding * g.abs()) for n, (g, bound) in of_gradients.items()},
    }


def check(found, expected):
    """That nothing errs by more than its bound; how near the worst of each comes to it, by name."""
    assert found.keys() == expected.keys()
    used = {n: float(((found[n].double() - e).abs() / (bound + FLOOR)).max()) for n, (e, bound) in expected.items()}
    assert all(part <= 1 for part in used.values()), used
    return used
