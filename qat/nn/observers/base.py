"""What an observer promises."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from qat.numerics.affine import qparams
from qat.numerics.scheme import Scheme


class Observer(ABC):
    """Finds the range that a tensor's scales are computed from. It keeps no state: what it says, the tensor said."""

    @abstractmethod
    def observe(self, x: Tensor, scheme: Scheme, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Range of every group of `x`: two fp32 tensors of the scale's shape.

        Args:
            x: The tensor, `[O, I]` for a weight.
            scheme: How it will be quantized.
            dtype: Storage dtype, since what matters is the rounded scale.
        """

    def qparams(self, x: Tensor, scheme: Scheme, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        """Scale (in its stored dtype) and zero point of `x`; see `numerics.affine.qparams`."""
        return qparams(*self.observe(x, scheme, dtype), scheme, dtype)
