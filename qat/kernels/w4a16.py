"""Weight-only linear: packed weights, activations in floating point. The reference, and the choice of a twin.

    x_TI [T, I] · dequantize(weight)_OI [O, I]ᵀ + bias_O [O] -> [T, O]          any leading shape in place of T

The weight stays packed in memory as `numerics/packing.py` packs it, whatever its grid (integers of 2 to 8 bits, FP8,
FP4, a codebook), symmetric or not, per group, channel or tensor. The reference unpacks a tile of output rows at a time
into a small scratch, dequantizes it with the project's one formula, `W_D = round_D(level * s)`, and multiplies. The
name says W4A16, after the commonest case.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.numerics.affine import dequantize
from qat.numerics.granularity import PerTensor
from qat.numerics.grid import IntGrid
from qat.numerics.packing import offset, pack, unpack
from qat.numerics.qtensor import QuantizedTensor
from qat.numerics.scheme import Scheme

# Weights in a tile. A weight costs up to 13 bytes of scratch on its way (octets, codes, steps, product), so even the
# larger tile stays within 64 MB. The smaller one is where a CPU's caches and the cost of an operation balance.
TILE_CPU, TILE = 1 << 20, 1 << 22


class Weight(Protocol):
    """A quantized weight in the layout of some kernel."""

    @property
    def shape(self) -> tuple[int, ...]:
        """`(O, I)`."""

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""

    def matmul(self, x: Tensor) -> Tensor:
        """x `[..., I]` times the weight's transpose -> `[..., O]` in x's dtype."""


@runtime_checkable
class Table(Weight, Protocol):
    """A weight in a layout whose rows can be read one by one: an embedding's, or a tied pair's."""

    def lookup(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows `ids` `[n]`, dequantized to `dtype`: `[n, I]`. Nothing else of the weight is touched."""


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """A quantized weight as it lies in the file: the layout that the reference works on.

    Attributes:
        words: Dense bitstream of the codes, integers plus `2**(bits-1)`, int32 `[O, ceil(I * bits / 32)]`.
        scale: In its stored dtype, of the scheme's scale shape.
        zero_point: int8, of the scale's shape; None on symmetric schemes.
        scheme: How the tensor is quantized.
        shape: `(O, I)`.
        global_scale: fp32 `[1]`, the divisor of a two-level scheme's scales; else None.
    """

    words: Tensor
    scale: Tensor
    zero_point: Tensor | None
    scheme: Scheme
    shape: tuple[int, ...]
    global_scale: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of words, scales and zero points."""
        more = (self.zero_point, self.global_scale)
        return self.words.nbytes + self.scale.nbytes + sum(part.nbytes for part in more if part is not None)

    def matmul(self, x: Tensor) -> Tensor:
        """x `[..., I]` -> `[..., O]`, by tiles dequantized to x's dtype."""
        return linear_by_tiles(x, self.shape, lambda start, stop: self.rows(start, stop, x.dtype))

    def rows(self, start: int, stop: int, dtype: torch.dtype) -> Tensor:
        """Output rows `[start, stop)` of the weight, dequantized to `dtype`: `[stop - start, I]`."""
        return self._dequantized(slice(start, stop), dtype)

    def lookup(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows `ids` `[n]`, dequantized to `dtype`: `[n, I]`."""
        return self._dequantized(ids, dtype)

    def codes(self, start: int, stop: int) -> Tensor:
        """Codes of output rows `[start, stop)`, int8 where they are integers: `[stop - start, I]`."""
        return self._codes(slice(start, stop))

    def _dequantized(self, rows: slice | Tensor, dtype: torch.dtype) -> Tensor:
        part = slice(None) if isinstance(self.scheme.granularity, PerTensor) else rows
        zero_point = None if self.zero_point is None else self.zero_point[part]
        codes = self._codes(rows)
        return dequantize(codes, self.scale[part], zero_point, dtype, self.scheme.grid, self.global_scale)

    def _codes(self, rows: slice | Tensor) -> Tensor:
        unsigned = unpack(self.words[rows], self.scheme.grid.bits, self.shape[1])
        if not isinstance(self.scheme.grid, IntGrid):
            return unsigned
        return unsigned.sub_(offset(self.scheme.grid.bits)).view(torch.int8)  # modulo 256, which is two's complement

    def to(self, device: torch.device | str) -> "PackedWeight":
        """The same weight on another device."""
        parts = ("words", "scale", "zero_point", "global_scale")
        return replace(self, **{p: t.to(device) for p in parts if (t := getattr(self, p)) is not None})


def pack_weight(tensor: QuantizedTensor) -> PackedWeight:
    """Packs a quantized tensor, on the device where it lies.

    Raises:
        ValueError: The tensor is no matrix, or has parts that a packed weight does not carry.
    """
    if len(tensor.shape) != 2 or tensor.g_idx is not None:
        raise ValueError(f"shape {tensor.shape}: only matrices without g_idx are served packed")
    grid, codes = tensor.scheme.grid, tensor.codes
    words = pack(codes.to(torch.int16) + offset(grid.bits) if isinstance(grid, IntGrid) else codes, grid.bits)
    return PackedWeight(words, tensor.scale, tensor.zero_point, tensor.scheme, tensor.shape, tensor.global_scale)


def linear_by_tiles(x: Tensor, shape: tuple[int, ...], rows: Callable[[int, int], Tensor]) -> Tensor:
    """`F.linear` by a weight that exists only a tile of rows at a time.

    Args:
        x: `[..., I]`.
        shape: `(O, I)` of the weight.
        rows: Gives rows `[start, stop)` of the weight in x's dtype.

    Returns:
        `[..., O]` in x's dtype.
    """
    step = max(1, (TILE_CPU if x.device.type == "cpu" else TILE) // shape[1])
    if step >= shape[0]:
        return F.linear(x, rows(0, shape[0]))
    y = x.new_empty(*x.shape[:-1], shape[0])
    for start in range(0, shape[0], step):
        stop = min(start + step, shape[0])
        y[..., start:stop] = F.linear(x, rows(start, stop))
    return y


def linear_reference(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    """The specification, in fp32 throughout: x `[..., I]` -> `[..., O]` fp32."""
    return linear(x.float(), weight, None if bias is None else bias.float())


def linear(x: Tensor, weight: Weight, bias: Tensor | None = None) -> Tensor:
    """The linear in x's dtype, by the kernel that the weight is laid out for.

    Words run tile by tile, dequantized to x's dtype: in fp32 that is the reference, in bf16 on a GPU it is
    `F.linear(x, round_bf16(W))`.
    """
    y = weight.matmul(x)
    return y if bias is None else y.add_(bias)


def specialize(weight: PackedWeight, spare: int) -> Weight:
    """The fastest layout of a weight on its device; it replaces the words, so that both are never kept.

    Args:
        weight: Packed words.
        spare: Bytes by which the layout may be larger than the words.

    Returns:
        A layout of another kernel, or `weight` itself where none exists, fits, or is faster.
    """
    if weight.words.device.type != "cpu" or not isinstance(weight.scheme.grid, IntGrid):
        return weight
    from qat.kernels.cpu import w4a16 as cpu  # the twin imports this module

    return cpu.specialize(weight, spare)
