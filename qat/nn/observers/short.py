"""A range whose scale has few binary digits."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qat.nn.observers.base import Observer, Range
from qat.numerics.affine import qparams
from qat.numerics.scheme import Scheme


@dataclass(frozen=True)
class Short(Observer):
    """Another observer's range, stretched so that its scale has at most `digits` significant bits, the nearest such.

    GGUF's Q4_1 stores scale times zero point in fp16, which has 11 bits: a zero point of 4 bits leaves 7 for the scale.
    The range moves by less than 2**-digits of itself. Scales that are learned afterwards lose what this gave them.

    Raises:
        ValueError: `digits` below 1.
    """

    of: Observer
    digits: int = 7

    def __post_init__(self) -> None:
        if self.digits < 1:
            raise ValueError(f"digits={self.digits}: a scale has at least one significant bit")

    def observe(self, x: Tensor, scheme: Scheme, dtype: torch.dtype, g: Tensor | None = None) -> Range:
        """Range of every group of `x`."""
        lo, hi = self.of.observe(x, scheme, dtype, g)
        scale = qparams(lo, hi, scheme, torch.float32, g)[0].float()
        mantissa, exponent = torch.frexp(scale)
        short = torch.ldexp(torch.round(mantissa * 2.0**self.digits), exponent - self.digits)
        return lo * (short / scale), hi * (short / scale)
