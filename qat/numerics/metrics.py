"""Error measures that tests, logs and reports share. All of them in fp32 or wider, whatever comes in."""

import torch
import torch.nn.functional as F
from torch import Tensor


def nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target in nats: logits `[T, V]`, targets `[T]` -> fp32 `[T]`."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


def kl(reference: Tensor, logits: Tensor, chunk: int = 128) -> Tensor:
    """Forward KL(reference || other) of each token in nats, T = 1: two `[T, V]` logits -> fp32 `[T]`.

    Works through `chunk` tokens at a time, so that no second copy of the logits exists.
    """
    parts = [
        F.kl_div(q.float().log_softmax(-1), p.float().log_softmax(-1), log_target=True, reduction="none").sum(-1)
        for p, q in zip(reference.split(chunk), logits.split(chunk), strict=True)
    ]
    return torch.cat(parts)


def top1_agree(reference: Tensor, logits: Tensor) -> Tensor:
    """Whether both logits `[T, V]` rank the same token first: bool `[T]`."""
    return reference.argmax(-1) == logits.argmax(-1)


def sqnr(reference: Tensor, other: Tensor) -> float:
    """Signal-to-quantization-noise ratio in dB, in fp64; inf where both are equal."""
    noise = (reference.double() - other.double()).square().sum()
    return float("inf") if noise == 0 else float(10 * torch.log10(reference.double().square().sum() / noise))
