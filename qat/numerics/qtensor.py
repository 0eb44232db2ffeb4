"""QuantizedTensor: the narrow waist. Every method that finds codes returns it; every format and kernel takes it."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qat.numerics.affine import dequantize, served
from qat.numerics.granularity import PerGroup
from qat.numerics.levels import code_dtype, decode
from qat.numerics.scheme import Scheme, integers


@dataclass(frozen=True, eq=False)
class QuantizedTensor:
    """A weight as integers, and what turns them back into values.

    Attributes:
        codes: `[O, I]`; signed integers (int8), or indices and bit patterns (uint8).
        scale: Scales in the dtype in which they are stored, of the scheme's scale shape.
        zero_point: int8, of the scale's shape; None on symmetric schemes.
        scheme: How the tensor is quantized.
        shape: `(O, I)`.
        global_scale: fp32 `[1]`, the divisor of a two-level scheme's scales; else None.
        g_idx: Group of each in-feature, int32 `[I]`, each group as often as any; None where it is `i // group_size`.

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
        kind = code_dtype(self.scheme.grid)
        if self.codes.dtype != kind or tuple(self.codes.shape) != tuple(self.shape):
            raise ValueError(
                f"codes {self.codes.dtype} {tuple(self.codes.shape)}: expected {str(kind)[6:]} {tuple(self.shape)}"
            )
        if (self.global_scale is not None) != self.scheme.two_level:
            raise ValueError(f"scheme {self.scheme}: a global scale goes with two-level schemes, and with no others")
        if tuple(self.scale.shape) != expected:
            raise ValueError(f"scale of shape {tuple(self.scale.shape)}: expected {expected}")
        if (self.zero_point is None) != self.scheme.symmetric:
            raise ValueError(f"symmetric={self.scheme.symmetric} but zero_point is {type(self.zero_point).__name__}")
        if self.zero_point is not None and tuple(self.zero_point.shape) != expected:
            raise ValueError(f"zero_point of shape {tuple(self.zero_point.shape)}: expected {expected}")
        if self.g_idx is not None:
            evenly = consecutive(self.shape[-1], expected[-1], self.g_idx.device)
            if self.g_idx.dtype != torch.int32 or not torch.equal(self.g_idx.sort().values, evenly):
                raise ValueError(
                    f"g_idx {self.g_idx.dtype} {tuple(self.g_idx.shape)}: expected int32 [{self.shape[-1]}], each of "
                    f"{expected[-1]} groups as often"
                )

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weight in `dtype`, `[O, I]`: `round_D(fp32((q - z) * s))`."""
        if (order := self.order) is not None:
            return self.in_order().dequantize(dtype)[:, order.argsort()]
        return dequantize(self.codes, self.scale, self.zero_point, dtype, self.scheme.grid, self.global_scale)

    @property
    def order(self) -> Tensor | None:
        """In-features, group after group; None where they lie so."""
        return None if self.g_idx is None else self.g_idx.argsort(stable=True)

    def in_order(self) -> "QuantizedTensor":
        """The weight of `x[..., order]`: every group is one of consecutive in-features."""
        return self if self.g_idx is None else replace(self, codes=self.codes[:, self.order], g_idx=None)

    @property
    def served(self) -> Tensor:
        """The scale that multiplies levels, fp32, of the scale's shape."""
        return served(self.scale, self.global_scale)

    def to(self, device: torch.device | str) -> "QuantizedTensor":
        """The same tensor on another device."""
        parts = ("codes", "scale", "zero_point", "global_scale", "g_idx")
        return replace(self, **{p: t.to(device) for p in parts if (t := getattr(self, p)) is not None})

    @property
    def bits(self) -> int:
        """Bits of codes, scales, zero points and `g_idx` together, as a dense format stores them."""
        zeros = 0 if self.zero_point is None else self.zero_point.numel() * self.scheme.grid.bits
        zeros += 0 if self.global_scale is None else 32
        zeros += 0 if self.g_idx is None else 32 * self.g_idx.numel()
        return self.codes.numel() * self.scheme.grid.bits + self.scale.numel() * self.scale.element_size() * 8 + zeros


def consecutive(columns: int, groups: int, device: torch.device | str = "cpu") -> Tensor:
    """Group of each in-feature where groups are of consecutive ones, int32 `[columns]`."""
    return torch.arange(columns, dtype=torch.int32, device=device) // (columns // groups)


def as_g_idx(found: Tensor, groups: int) -> Tensor | None:
    """The group of each in-feature as a `QuantizedTensor` has it."""
    found = found.to(torch.int32)
    return None if torch.equal(found, consecutive(len(found), groups, found.device)) else found


def regrouped(tensor: QuantizedTensor, granularity: PerGroup) -> QuantizedTensor:
    """The same values in smaller groups: each scale and zero point stands once for every group that it served.

    Raises:
        ValueError: The groups do not divide the tensor's own.
    """
    assert tensor.g_idx is None, "its groups are not of consecutive in-features, so smaller ones are not either"
    rows, groups = granularity.scale_shape(tensor.shape)
    own = 1 if tensor.scale.dim() == 1 else tensor.scale.shape[1]
    if groups % own:
        raise ValueError(f"groups of {granularity.group_size} do not divide those of {tensor.scheme}")

    def spread(part: Tensor) -> Tensor:
        return part.reshape(-1, own, 1).expand(rows, own, groups // own).reshape(rows, groups).contiguous()

    zero_point = None if tensor.zero_point is None else spread(tensor.zero_point)
    scheme = replace(tensor.scheme, granularity=granularity)
    return replace(tensor, scale=spread(tensor.scale), zero_point=zero_point, scheme=scheme)


def as_integers(tensor: QuantizedTensor) -> QuantizedTensor:
    """The same values with integer codes, where the levels of the codebook are integers; scales do not change."""
    scheme = integers(tensor.scheme)
    if scheme == tensor.scheme:
        return tensor
    return replace(tensor, codes=decode(tensor.codes, tensor.scheme.grid).to(torch.int8), scheme=scheme)
