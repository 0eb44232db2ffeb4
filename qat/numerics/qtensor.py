"""QuantizedTensor: the narrow waist. Every method that finds codes returns it; every format and kernel takes it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qat.numerics.affine import dequantize
from qat.numerics.scheme import Scheme


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A weight as integers, and what turns them back into values.

    Attributes:
        codes: Signed codes, int8, `[O, I]`.
        scale: Scales in the dtype in which they are stored, of the scheme's scale shape.
        zero_point: int8, of the scale's shape; None on symmetric schemes.
        scheme: How the tensor is quantized.
        shape: `(O, I)`.
        global_scale: A second, per-tensor scale, for grids that have one.
        g_idx: Group of each in-feature, where it is not `i // group_size`.

    Raises:
        ValueError: The parts do not fit each other.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: Scheme
    shape: tuple[int, ...]
    global_scale: Tensor | None = None
    g_idx: Tensor | None = None

    def __post_init__(self) -> None:
        expected = self.scheme.granularity.scale_shape(self.shape)
        if self.codes.dtype != torch.int8 or tuple(self.codes.shape) != tuple(self.shape):
            raise ValueError(f"codes {self.codes.dtype} {tuple(self.codes.shape)}: expected int8 {tuple(self.shape)}")
        if tuple(self.scale.shape) != expected:
            raise ValueError(f"scale of shape {tuple(self.scale.shape)}: expected {expected}")
        if (self.zero_point is None) != self.scheme.symmetric:
            raise ValueError(f"symmetric={self.scheme.symmetric} but zero_point is {type(self.zero_point).__name__}")
        if self.zero_point is not None and tuple(self.zero_point.shape) != expected:
            raise ValueError(f"zero_point of shape {tuple(self.zero_point.shape)}: expected {expected}")

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`, `[O, I]`: `round_D(fp32((q - z) * s))`."""
        return dequantize(self.codes, self.scale, self.zero_point, dtype)

    def to(self, device: torch.device | str) -> "QuantizedTensor":
        """The same tensor on another device."""
        parts = ("codes", "scale", "zero_point", "global_scale", "g_idx")
        return replace(self, **{p: t.to(device) for p in parts if (t := getattr(self, p)) is not None})

    @property
    def bits(self) -> int:
        """Bits of codes, scales and zero points together, as a dense format stores them."""
        zeros = 0 if self.zero_point is None else self.zero_point.numel() * self.scheme.grid.bits
        return self.codes.numel() * self.scheme.grid.bits + self.scale.numel() * self.scale.element_size() * 8 + zeros
