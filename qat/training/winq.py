"""WinQ: masters are brought nearer to the centres of their cells from time to time."""

from dataclasses import dataclass

import torch
from torch import nn

from qat.surgery.prepare import fake_quants, set_strength


@dataclass(frozen=True)
class WinQ:
    """Periodic re-initialisation of arXiv:2605.17471: after every `every`-th optimizer step

        W <- (1 - alpha) W + alpha Q(W)

    for the masters of every quantized linear that trains. alpha is the paper's: its published code has alpha and
    1 - alpha exchanged, so that its 0.2 is 0.8 here. Deviations: the paper's other half, gradients at noisy weights, is
    left out; K here is for runs of a few hundred steps, the paper's are 40,000 to 80,000. Adam's state is left alone.

    Every master stays in its cell, so no code changes, and neither does what would be exported, nor, at lambda = 1, the
    next step's loss. What changes is how far the following steps must push it to leave. The cost is one rounding of
    every weight.

    Attributes:
        every: K, in optimizer steps.
        alpha: The share of Q(W), above 0; 1 puts every master at the centre of its cell.

    Raises:
        ValueError: A value is out of its range.
    """

    every: int
    alpha: float

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"winq.every={self.every}: expected a number of steps, 1 or more")
        if not 0 < self.alpha <= 1:
            raise ValueError(f"winq.alpha={self.alpha}: expected a number above 0, at most 1")


@torch.no_grad()
def reinitialise(model: nn.Module, alpha: float) -> None:
    """Moves the masters of every quantized linear, in place, by the fraction `alpha` of the way to their grid.

    Args:
        model: A prepared model whose scales are settled: in phase LEARN or FROZEN.
        alpha: From 0 to 1.
    """
    set_strength(model, 1.0)
    for linear in fake_quants(model).values():
        if linear.weight.requires_grad:
            center = linear.weight_fake_quant(linear.weight, torch.float32)
            linear.weight.mul_(1 - alpha).add_(center, alpha=alpha)  # lerp_ loses the sign of -0, a code of e2m1
