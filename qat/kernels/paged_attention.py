"""Causal attention over a paged cache, for any mix of prefill chunks and decode rows. The reference.

    q [T, heads, head_dim], caches [blocks, kv_heads, block_size, head_dim] -> [T, heads, head_dim]

A batch is the tokens of several sequences one after another. Sequence i brings its last `query_lens[i]` tokens; they
see its first `context_lens[i]` tokens, themselves included, whose keys and values are in the cache already. Vectors are
gathered slot by slot and only where a token has been written, so nothing that lies in the unused part of a block, NaN
included, is ever read. The softmax is fp32.

Sequences that bring one token are computed together. Their contexts are padded to the longest of a bucket, and buckets
span a factor of two, so padding can at most double the work. Prefill chunks are computed one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from qat.kernels.kv_store import rows_of


@dataclass(frozen=True, eq=False)
class Paging:
    """Where the tokens of a batch are written, and what they read. One for all layers.

    Attributes:
        slots: Slot of each token, int64 `[T]`; -1: not written.
        block_tables: Blocks of each sequence, int64 `[S, most blocks]`; entries past a sequence's own are ignored.
        query_lens: Tokens that each sequence brings, in the batch's order; they sum to T.
        context_lens: Tokens that each sequence then has in the cache.
        block_size: Tokens in a block.
    """

    slots: Tensor
    block_tables: Tensor
    query_lens: Sequence[int]
    context_lens: Sequence[int]
    block_size: int

    @cached_property
    def chunks(self) -> "list[Chunk]":
        """What is computed at once."""
        starts = [0]
        for length in self.query_lens:
            starts.append(starts[-1] + length)
        buckets: dict[int, list[int]] = {}
        chunks = []
        for i, length in enumerate(self.query_lens):
            if length == 1:
                buckets.setdefault(self.context_lens[i].bit_length(), []).append(i)
            elif length > 1:
                chunks.append(self._prefill(i, starts[i]))
        return chunks + [self._decode(members, [starts[i] for i in members]) for members in buckets.values()]

    def _decode(self, members: list[int], starts: list[int]) -> "Chunk":
        device = self.slots.device
        lengths = torch.tensor([self.context_lens[i] for i in members], device=device)
        longest = max(self.context_lens[i] for i in members)
        positions = torch.arange(longest, device=device).expand(len(members), -1)
        valid = positions < lengths[:, None]
        slots = self._slots(torch.tensor(members, device=device), torch.where(valid, positions, 0))
        padded = any(self.context_lens[i] < longest for i in members)
        rows = torch.tensor(starts, device=device)
        return Chunk(rows, slots, valid[:, None, None] if padded else None, 1)

    def _prefill(self, member: int, start: int) -> "Chunk":
        device, length, context = self.slots.device, self.query_lens[member], self.context_lens[member]
        positions = torch.arange(context, device=device)
        slots = self._slots(torch.tensor([member], device=device), positions[None])
        mask = positions <= torch.arange(context - length, context, device=device)[:, None]
        rows = torch.arange(start, start + length, device=device)
        return Chunk(rows, slots, mask, length)

    def _slots(self, members: Tensor, positions: Tensor) -> Tensor:
        blocks = self.block_tables[members[:, None], positions // self.block_size]
        return blocks * self.block_size + positions % self.block_size


@dataclass(frozen=True, eq=False)
class Chunk:
    """Rows of a batch that are computed at once: one prefill chunk, or one token each of several sequences.

    Attributes:
        rows: Their places in the batch, `[n * length]`.
        slots: What each sequence reads, `[n, L]`; padding repeats the slot of its first token.
        mask: True where a query sees a key, broadcast over `[n, kv_heads, queries, L]`; None: everywhere.
        length: Tokens of each sequence.
    """

    rows: Tensor
    slots: Tensor
    mask: Tensor | None
    length: int


def paged_attention(q_THD: Tensor, k_cache: Tensor, v_cache: Tensor, paging: Paging, scale: float) -> Tensor:
    """Attention of every token of the batch over its sequence's context.

    Args:
        q_THD: Queries after the rotation, `[T, heads, head_dim]`; heads a multiple of the cache's.
        k_cache: Keys, the batch's own included.
        v_cache: Values, the batch's own included.
        paging: What each token reads.
        scale: Factor of the scores, before the softmax.

    Returns:
        `[T, heads, head_dim]` in q's dtype.
    """
    out = torch.empty_like(q_THD)
    kv_heads, dim = k_cache.shape[1], k_cache.shape[3]
    for chunk in paging.chunks:
        n, context = chunk.slots.shape
        rows = rows_of(chunk.slots, k_cache).transpose(1, 2).flatten()
        k, v = (
            c.view(-1, dim).index_select(0, rows).view(n, kv_heads, context, dim).to(q_THD.dtype)
            for c in (k_cache, v_cache)
        )
        q = q_THD.index_select(0, chunk.rows)
        if chunk.length == 1:  # the heads of a group see the same keys: they are the queries of one head
            y = F.scaled_dot_product_attention(q.view(n, kv_heads, -1, dim), k, v, chunk.mask, scale=scale)
            y = y.reshape(n, -1, dim)
        else:
            q = q.view(chunk.length, kv_heads, -1, dim).permute(1, 2, 0, 3)
            k, v = (t[0, :, None].expand(-1, q.shape[1], -1, -1) for t in (k, v))
            y = F.scaled_dot_product_attention(q, k, v, chunk.mask, scale=scale)
            y = y.permute(2, 0, 1, 3).reshape(chunk.length, -1, dim)
        out.index_copy_(0, chunk.rows, y)
    return out
