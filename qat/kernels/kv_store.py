"""Writes new keys and values into the paged cache. The reference.

cache [blocks, kv_heads, block_size, head_dim]        slot = block * block_size + offset in the block
"""

from torch import Tensor


def kv_store(k_THD: Tensor, v_THD: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Writes each token's key and value at its slot. Never waits for the device.

    Args:
        k_THD: Keys after the rotation, `[T, kv_heads, head_dim]`.
        v_THD: Values, of the same shape.
        k_cache: Written in place.
        v_cache: Written in place.
        slots: int64 `[T]`, no slot twice.
    """
    block_size = k_cache.shape[2]
    block, offset = slots // block_size, slots % block_size
    k_cache[block, :, offset] = k_THD.to(k_cache.dtype)
    v_cache[block, :, offset] = v_THD.to(v_cache.dtype)
