"""A range that follows the tensors with a delay."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qat.nn.observers.base import Observer, Range
from qat.numerics.affine import ranges
from qat.numerics.scheme import Scheme


@dataclass(frozen=True)
class EMA(Observer):
    """Exponential moving average of the min-max range over batches (arXiv:1712.05877, section 3.1).

    `range = decay * range + (1 - decay) * new`; the first batch is taken as it is. For a weight, of which there is only
    one, it is min-max.

    Raises:
        ValueError: `decay` outside [0, 1).
    """

    decay: float = 0.9
    averages = True

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise ValueError(f"decay={self.decay}: expected 0 <= decay < 1")

    def observe(self, x: Tensor, scheme: Scheme, dtype: torch.dtype, g: Tensor | None = None) -> Range:
        """Range of every group of `x`."""
        return ranges(x, scheme)

    def merge(self, old: Range, new: Range, seen: int) -> Range:
        """The average after one more batch."""
        return torch.lerp(new[0], old[0], self.decay), torch.lerp(new[1], old[1], self.decay)
