"""The range that a tensor has."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qat.nn.observers.base import Observer, Range
from qat.numerics.affine import ranges
from qat.numerics.scheme import Scheme


@dataclass(frozen=True)
class MinMax(Observer):
    """Smallest and largest element of every group: nothing is clipped but what the grid's convention clips."""

    def observe(self, x: Tensor, scheme: Scheme, dtype: torch.dtype, g: Tensor | None = None) -> Range:
        """Range of every group of `x`."""
        return ranges(x, scheme)
