"""Writes new keys and values into the paged cache. The reference.

cache [blocks, kv_heads, block_size, head_dim]        slot = block * block_size + offset in the block
"""

import torch
from torch import Tensor


def rows_of(slots: Tensor, cache: Tensor) -> Tensor:
    """Where the vectors of a slot lie: rows of `cache.view(-1, head_dim)`, one for each KV head.

    Args:
        slots: Slots, int64 of any shape `[...]`.
        cache: A key or value cache.

    Returns:
        int64 `[..., kv_heads]`.
    """
    _, kv_heads, block_size, _ = cache.shape
    block, offset = slots // block_size, slots % block_size
    heads = torch.arange(kv_heads, device=slots.device)
    return (block.unsqueeze(-1) * kv_heads + heads) * block_size + offset.unsqueeze(-1)


def kv_store(k_THD: Tensor, v_THD: Tensor, k_cache: Tensor, v_cache: Tensor, slots: Tensor) -> None:
    """Writes each token's key and value at its slot; a slot of -1 is not written.

    Args:
        k_THD: Keys after the rotation, `[T, kv_heads, head_dim]`.
        v_THD: Values, of the same shape.
        k_cache: Written in place.
        v_cache: Written in place.
        slots: int64 `[T]`, no slot twice.
    """
    dim = k_cache.shape[-1]
    kept = slots >= 0
    if not bool(kept.all()):
        k_THD, v_THD, slots = k_THD[kept], v_THD[kept], slots[kept]
    rows = rows_of(slots, k_cache).flatten()
    k_cache.view(-1, dim).index_copy_(0, rows, k_THD.reshape(-1, dim).to(k_cache.dtype))
    v_cache.view(-1, dim).index_copy_(0, rows, v_THD.reshape(-1, dim).to(v_cache.dtype))
