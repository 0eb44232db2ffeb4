"""The range that all but a few elements have."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qat.nn.observers.base import Observer, Range
from qat.numerics.scheme import Scheme


@dataclass(frozen=True)
class Percentile(Observer):
    """The smallest and largest element of every group once the most extreme ones are left out, on either side alike.

    Of n elements, `floor(n (1 - percent / 100))` are left out at each end, so small groups lose none. Ranges of several
    batches are averaged.

    Raises:
        ValueError: `percent` outside (50, 100].
    """

    percent: float = 99.99
    averages = True

    def __post_init__(self) -> None:
        if not 50 < self.percent <= 100:
            raise ValueError(f"percent={self.percent}: expected 50 < percent <= 100")

    def observe(self, x: Tensor, scheme: Scheme, dtype: torch.dtype, g: Tensor | None = None) -> Range:
        """Range of every group of `x`."""
        grouped = x.detach().float().reshape(*scheme.granularity.scale_shape(tuple(x.shape)), -1)
        count = grouped.shape[-1]
        left_out = math.floor(count * (1 - self.percent / 100))
        return grouped.kthvalue(left_out + 1, -1).values, grouped.kthvalue(count - left_out, -1).values
