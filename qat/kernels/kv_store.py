"""Writes new keys and values into the paged cache, quantized where the cache is. The reference.

A cache holds the vectors of one layer, keys or values; slot = block * block_size + offset in the block.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from qat.kernels.kv_quant import dequantize_kv, quantize_kv


@dataclass(frozen=True, eq=False)
class PagedVectors:
    """Keys, or values, of one layer.

    Attributes:
        data: `[blocks, kv_heads, block_size, C]`: vectors, or codes as `kv_quant.quantize_kv` stores them.
        scale: fp32 `[blocks, kv_heads, block_size]`; None where vectors are kept as they are.
        kind: One of `numerics.kv.KINDS`; None likewise.
    """

    data: Tensor
    scale: Tensor | None = None
    kind: str | None = None

    @classmethod
    def empty(
        cls, shape: tuple[int, int, int, int], kind: str | None, dtype: torch.dtype, device: torch.device
    ) -> "PagedVectors":
        """Room for vectors, whatever lies there: `shape` is `(blocks, kv_heads, block_size, head_dim)`.

        It is not zeroed: nothing reads a slot before it is written, and a CPU hands out memory as it is touched.
        """
        if kind is None:
            return cls(torch.empty(shape, dtype=dtype, device=device))
        codes, _ = quantize_kv(torch.zeros(shape[-1]), kind)
        data = torch.empty((*shape[:-1], len(codes)), dtype=codes.dtype, device=device)
        return cls(data, torch.empty(shape[:-1], dtype=torch.float32, device=device), kind)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales."""
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def write(self, x_THD: Tensor, block: Tensor, offset: Tensor) -> None:
        """Puts each token's vectors at its place."""
        if self.kind is None or self.scale is None:
            self.data[block, :, offset] = x_THD.to(self.data.dtype)
        else:
            self.data[block, :, offset], self.scale[block, :, offset] = quantize_kv(x_THD, self.kind)

    def read(self, places: Tensor, span: int, dtype: torch.dtype) -> Tensor:
        """Vectors `[..., span, head_dim]` in `dtype`.

        They lie in memory of a rounded size: contexts grow with every step, and memory that was freed is of use for the
        next one only if it is as large. At most a fifth is spare.

        Args:
            places: int64 `[...]`: `((block * kv_heads + head) * block_size + offset) / span` of each span.
            span: Neighbours that are read together; divides the block size.
            dtype: What they are widened or dequantized to.
        """
        shape, vectors = (*places.shape, span), places.numel() * span
        data = _gathered(self.data, places, span)
        if self.kind is not None and self.scale is not None:
            scale = _gathered(self.scale.unsqueeze(-1), places, span)
            data = dequantize_kv(data, scale.squeeze(-1), self.kind, dtype)
        return data[:vectors].view(*shape, -1).to(dtype)


def _gathered(cache: Tensor, places: Tensor, span: int) -> Tensor:
    """Vectors `[n, C]` of the spans at places, and spare ones behind them that hold whatever lay there."""
    count, size = places.numel(), cache.shape[-1]
    step = 1 << max(0, count.bit_length() - 3)
    room = cache.new_empty(-(-count // step) * step, span * size)
    torch.index_select(cache.view(-1, span * size), 0, places.reshape(-1), out=room[:count])
    return room.view(-1, size)


def kv_store(k_THD: Tensor, v_THD: Tensor, k_cache: PagedVectors, v_cache: PagedVectors, slots: Tensor) -> None:
    """Writes each token's key and value at its slot. Never waits for the device.

    Args:
        k_THD: Keys after the rotation, `[T, kv_heads, head_dim]`.
        v_THD: Values, of the same shape.
        k_cache: Written in place.
        v_cache: Written in place.
        slots: int64 `[T]`, no slot twice.
    """
    block_size = k_cache.data.shape[2]
    block, offset = slots // block_size, slots % block_size
    k_cache.write(k_THD, block, offset)
    v_cache.write(v_THD, block, offset)
