"""Weight-only linear on a CPU, through the packed matmul operators that torch ships.

    4 bits   `_weight_int4pack_mm_for_cpu`   groups of 32, 64, 128 or 256, O % 16 == 0, W = (u - 8) * s + z
    8 bits   `_weight_int8pack_mm`           symmetric, one scale a row, I % 32 == 0 (it reads astray), W = q * s

Both are fast in bf16 only, so x is rounded to bf16 on the way in and y comes out rounded to it; sums are fp32. With
u = 2**-8 (bf16's unit roundoff) and zs the product of zero point and scale (0 if symmetric), to first order in u:

    |y - ref|  <=  u |ref|  +  sum_i |x_i| (3u |W_i| + 2u |zs_i|)  +  I 2**-23 sum_i |x_i| (|W_i| + 2 |zs_i|)

Where it comes from: y, x, s, z and W's elements are each rounded to bf16 at most once. x and W cost u |x_i W_i| each.
s multiplies q, and |q s| <= |W| + |zs|, so it costs u |x_i| (|W_i| + |zs_i|); z = -zs costs u |x_i zs_i|. The last term
is the summation in fp32. A symmetric weight whose scales are stored in bf16 errs by the roundings of x and y alone.

The 4-bit layout depends on the machine's instruction set, so it is made at load and never stored. For many tokens,
multiplying by dequantized tiles is faster than either operator: a micro-benchmark for each shape class finds from how
many on, and whether the operator is right and helps at all.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from qat.kernels.w4a16 import TILE_CPU, PackedWeight, Weight, linear_by_tiles, linear_reference
from qat.numerics.granularity import PerGroup
from qat.numerics.packing import unpack

GROUPS = (256, 128, 64, 32)  # that the 4-bit operator knows
BLOCKS = (64, 32)  # rows that lie interleaved in its layout: AVX-512, AVX2
TOKENS = (32, 128, 512)  # where the micro-benchmark looks for the crossover
NEVER = 1 << 62


@dataclass(frozen=True, eq=False)
class Int4Weight:
    """A 4-bit weight in the operator's layout.

    Attributes:
        packed: uint8 `[O, I / 2]`, in an order of the operator's own.
        scale_zero: bf16 `[I / group_size, O, 2]`: s and z of W = (u - 8) * s + z.
        group_size: In-features that share a scale, as the operator sees it.
        shape: `(O, I)`.
        block: Rows that lie interleaved in `packed`; 0 where the order is not one that we can read back.
        crossover: Tokens from which dequantizing tiles is faster than the operator.
    """

    packed: Tensor
    scale_zero: Tensor
    group_size: int
    shape: tuple[int, ...]
    block: int = 0
    crossover: int = NEVER

    @property
    def nbytes(self) -> int:
        """Bytes of codes, scales and zeros."""
        return self.packed.nbytes + self.scale_zero.nbytes

    def matmul(self, x: Tensor) -> Tensor:
        """x `[..., I]` -> `[..., O]` in x's dtype."""
        x_TI = x.reshape(-1, self.shape[1])
        y_TO = self.by_operator(x_TI) if len(x_TI) < self.crossover else self.by_tiles(x_TI)
        return y_TO.to(x.dtype).view(*x.shape[:-1], -1)

    def by_operator(self, x_TI: Tensor) -> Tensor:
        """x `[T, I]` -> bf16 `[T, O]`, straight from the packed weight."""
        return torch._weight_int4pack_mm_for_cpu(x_TI.bfloat16(), self.packed, self.group_size, self.scale_zero)

    def by_tiles(self, x_TI: Tensor) -> Tensor:
        """x `[T, I]` -> fp32 `[T, O]`, a tile of the weight at a time; the layout gives it transposed."""
        rows, columns = self.shape
        y_TO = torch.empty(len(x_TI), rows)
        step = max(1, TILE_CPU // (columns * self.block)) * self.block
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            steps = self.columns(start, stop).float().sub_(8).view(-1, self.group_size, stop - start)
            scale, zero = self.scale_zero[:, None, start:stop].float().unbind(-1)
            y_TO[:, start:stop] = x_TI.float() @ steps.mul_(scale).add_(zero).view(columns, -1)
        return y_TO

    def columns(self, start: int, stop: int) -> Tensor:
        """Unsigned codes of rows `[start, stop)`, whole blocks, transposed: uint8 `[I, stop - start]`.

        For each in-feature, a block holds `block / 2` bytes, each of them with two rows that lie half a block apart.
        """
        half = self.block // 2
        words = self.packed[start:stop].reshape(-1, half).view(torch.int32)
        pairs = unpack(words, 4, self.block).view(-1, self.shape[1], half, 2)
        return pairs.permute(1, 0, 3, 2).reshape(self.shape[1], stop - start)


@dataclass(frozen=True, eq=False)
class Int8Weight:
    """An 8-bit symmetric weight with one scale a row, as `_weight_int8pack_mm` takes it.

    Attributes:
        codes: int8 `[O, I]`.
        scale: bf16 `[O]`.
        shape: `(O, I)`.
        crossover: Tokens from which dequantizing tiles is faster than the operator.
    """

    codes: Tensor
    scale: Tensor
    shape: tuple[int, ...]
    crossover: int = NEVER

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.codes.nbytes + self.scale.nbytes

    def matmul(self, x: Tensor) -> Tensor:
        """x `[..., I]` -> `[..., O]` in x's dtype."""
        x_TI = x.reshape(-1, self.shape[1])
        y_TO = self.by_operator(x_TI) if len(x_TI) < self.crossover else self.by_tiles(x_TI)
        return y_TO.to(x.dtype).view(*x.shape[:-1], -1)

    def by_operator(self, x_TI: Tensor) -> Tensor:
        """x `[T, I]` -> bf16 `[T, O]`, straight from the codes."""
        return torch._weight_int8pack_mm(x_TI.bfloat16(), self.codes, self.scale)

    def by_tiles(self, x_TI: Tensor) -> Tensor:
        """x `[T, I]` -> fp32 `[T, O]`, a tile of the weight at a time."""
        scale = self.scale.float()[:, None]
        return linear_by_tiles(x_TI.float(), self.shape, lambda a, b: self.codes[a:b].float().mul_(scale[a:b]))

    def lookup(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows `ids` `[n]`, dequantized to `dtype`: `[n, I]`."""
        return self.codes[ids].float().mul_(self.scale[ids].float()[:, None]).to(dtype)


def specialize(weight: PackedWeight, spare: int) -> Weight:
    """See `qat.kernels.w4a16.specialize`."""
    fast = int4_weight(weight) or int8_weight(weight)
    if fast is None or fast.nbytes > weight.nbytes + spare:
        return weight
    crossover = _crossover(weight, fast)
    return weight if crossover == 0 else replace(fast, crossover=crossover)


def int4_weight(weight: PackedWeight) -> Int4Weight | None:
    """The weight in the 4-bit operator's layout, or None where the operator does not serve it."""
    rows, columns = weight.shape
    granularity = weight.scheme.granularity
    span = granularity.group_size if isinstance(granularity, PerGroup) else columns
    group_size = next((g for g in GROUPS if span % g == 0), None)
    if weight.scheme.grid.bits != 4 or rows % 16 or group_size is None:
        return None

    def by_group(values: Tensor) -> Tensor:  # of the scale's shape -> [I / group_size, O]
        return values.float().view(-1, columns // span).expand(rows, -1).repeat_interleave(span // group_size, 1).T

    scale = by_group(weight.scale)
    zero = torch.zeros_like(scale) if weight.zero_point is None else -by_group(weight.zero_point) * scale
    codes = weight.codes(0, rows).to(torch.int32).add_(8)
    packed = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    scale_zero = torch.stack([scale, zero], -1).bfloat16()
    layouts = [Int4Weight(packed, scale_zero, group_size, weight.shape, b) for b in BLOCKS if rows % b == 0]
    known = (w for w in layouts if torch.equal(w.columns(0, w.block), codes[: w.block].T.to(torch.uint8)))
    return next(known, Int4Weight(packed, scale_zero, group_size, weight.shape))


def int8_weight(weight: PackedWeight) -> Int8Weight | None:
    """The weight as the 8-bit operator takes it, or None where the operator does not serve it."""
    scheme = weight.scheme
    if scheme.grid.bits != 8 or not scheme.symmetric or isinstance(scheme.granularity, PerGroup):
        return None
    rows, columns = weight.shape
    if columns % 32:
        return None
    scale = weight.scale.view(-1).expand(rows).bfloat16().contiguous()
    return Int8Weight(weight.codes(0, rows), scale, weight.shape)


_measured: dict[tuple[object, ...], int] = {}  # shape class -> crossover


def _crossover(weight: PackedWeight, fast: Int4Weight | Int8Weight) -> int:
    """Tokens from which tiles beat the operator, measured once for each shape class; 0 if they do for one token."""
    readable = isinstance(fast, Int8Weight) or fast.block > 0
    key = (weight.shape, weight.scheme, weight.scale.dtype, readable, torch.get_num_threads())
    if key not in _measured:
        _measured[key] = _measure(weight, fast, TOKENS if readable else ())
    return _measured[key]


def _measure(weight: PackedWeight, fast: Int4Weight | Int8Weight, tokens: tuple[int, ...]) -> int:
    x_TI = torch.randn(max(TOKENS), weight.shape[1], generator=torch.Generator().manual_seed(0))
    reference, y = linear_reference(x_TI[:2], weight), fast.by_operator(x_TI[:2]).float()
    if not float((y - reference).norm()) < 2**-5 * float(reference.norm()):  # an operator that errs on this machine
        return 0
    if _seconds(lambda x: linear_reference(x, weight), x_TI[:1]) < _seconds(fast.by_operator, x_TI[:1]):
        return 0
    return next((t for t in tokens if _seconds(fast.by_tiles, x_TI[:t]) < _seconds(fast.by_operator, x_TI[:t])), NEVER)


def _seconds(kernel: Callable[[Tensor], Tensor], x_TI: Tensor) -> float:
    times = []
    for _ in range(3):
        start = time.perf_counter()
        kernel(x_TI)
        times.append(time.perf_counter() - start)
    return min(times)
