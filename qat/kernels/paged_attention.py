"""Causal attention over a paged cache, for any mix of prefill chunks and decode rows. The reference.

    q [T, heads, head_dim], caches of keys and values [blocks, kv_heads, block_size, ...] -> [T, heads, head_dim]

A batch is the tokens of several sequences one after another. Sequence i brings its last `query_lens[i]` tokens; they
see its first `context_lens[i]` tokens, themselves included, whose keys and values are in the cache already. Vectors are
gathered slot by slot and only where a token has been written, so nothing that lies in the unused part of a block, NaN
included, is ever read. Where the cache is quantized they are dequantized as they are gathered, the batch's own tokens
among them. The softmax is fp32.

Sequences that bring one token are computed together. Their contexts are padded to the longest of a bucket, and buckets
span a factor of two, so padding can at most double the work. Prefill chunks are computed one by one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from qat.kernels.kv_store import PagedVectors

SPAN = 8  # tokens gathered at once, where a block has them: 128 bytes each make rows of a kilobyte


@dataclass(frozen=True, eq=False)
class Paging:
    """Where the tokens of a batch are written, and what they read. One for all layers.

    Attributes:
        slots: Slot of each token, int64 `[T]`.
        block_tables: Blocks of each sequence, int64 `[S, most blocks]`; entries past a sequence's own are ignored.
        query_lens: Tokens that each sequence brings, in the batch's order; they sum to T.
        context_lens: Tokens that each sequence then has in the cache.
        cache_shape: Shape of a cache: its first three axes are blocks, key-value heads and slots of a block.
    """

    slots: Tensor
    block_tables: Tensor
    query_lens: Sequence[int]
    context_lens: Sequence[int]
    cache_shape: tuple[int, ...]

    @cached_property
    def chunks(self) -> "list[Chunk]":
        """What is computed at once."""
        lengths, contexts = np.array(self.query_lens), np.array(self.context_lens)
        starts = lengths.cumsum() - lengths
        chunks = [self._prefill(int(i), int(starts[i])) for i in np.flatnonzero(lengths > 1)]
        decoding = np.flatnonzero(lengths == 1)
        buckets = np.frexp(contexts[decoding])[1]  # bits of each length
        for bucket in np.unique(buckets):
            members = decoding[buckets == bucket]
            chunks.append(self._decode(members, starts[members], contexts[members]))
        return chunks

    def _decode(self, members: np.ndarray, starts: np.ndarray, contexts: np.ndarray) -> "Chunk":
        device = self.slots.device
        lengths, rows, indices = (torch.from_numpy(a).to(device) for a in (contexts, starts, members))
        read, seen, last = self._spans(indices, lengths, int(contexts.max()))
        every = bool((contexts == seen.shape[-1]).all())
        return Chunk(rows, read, self.span, None if every else last, None if every else seen[:, None, None], seen, 1)

    def _prefill(self, member: int, start: int) -> "Chunk":
        device, length, context = self.slots.device, self.query_lens[member], self.context_lens[member]
        index, lengths = torch.tensor([member], device=device), torch.tensor([context], device=device)
        read, seen, last = self._spans(index, lengths, context)
        positions = torch.arange(seen.shape[-1], device=device)
        mask = positions <= torch.arange(context - length, context, device=device)[:, None]
        rows = torch.arange(start, start + length, device=device)
        return Chunk(rows, read, self.span, last, mask, seen, length)

    @property
    def span(self) -> int:
        """Tokens that are gathered at once: a GPU gathers rows, and a row for each token would be a short one."""
        return math.gcd(SPAN, self.cache_shape[2])

    def _spans(self, members: Tensor, lengths: Tensor, longest: int) -> tuple[Tensor, Tensor, Tensor]:
        """What sequences read, in spans: where each lies `[n, kv_heads, S]`, which of its tokens are seen `[n, L]`, and
        which span holds a sequence's last token `[n]`. Padding repeats a sequence's first span."""
        _, kv_heads, block_size = self.cache_shape[:3]
        device, parts = self.slots.device, block_size // self.span
        spans = torch.arange(-(-longest // self.span), device=device).expand(len(members), -1)
        last = (lengths - 1) // self.span
        spans = torch.where(spans <= last[:, None], spans, 0)
        block = self.block_tables[members[:, None], spans // parts]
        heads = torch.arange(kv_heads, device=device)[:, None]
        places = (block[:, None] * kv_heads + heads) * parts + (spans % parts)[:, None]
        seen = torch.arange(spans.shape[1] * self.span, device=device) < lengths[:, None]
        return places, seen, last


@dataclass(frozen=True, eq=False)
class Chunk:
    """Rows of a batch that are computed at once: one prefill chunk, or one token each of several sequences.

    Attributes:
        rows: Their places in the batch, `[n * length]`.
        read: Spans of the cache that each sequence reads, `[n, kv_heads, S]`.
        span: Tokens of a span.
        last: The span of each sequence's last token, `[n]`; None: every token of every span is seen.
        mask: True where a query sees a key, broadcast over `[n, kv_heads, queries, S * span]`; None: everywhere.
        seen: True where a token belongs to its sequence, `[n, S * span]`.
        length: Tokens of each sequence.
    """

    rows: Tensor
    read: Tensor
    span: int
    last: Tensor | None
    mask: Tensor | None
    seen: Tensor
    length: int

    def gathered(self, cache: PagedVectors, dtype: torch.dtype) -> Tensor:
        """Vectors `[n, kv_heads, S * span, head_dim]`; 0 where the last span goes beyond its sequence."""
        n, kv_heads, spans = self.read.shape
        vectors = cache.read(self.read, self.span, dtype).view(n, kv_heads, spans, self.span, -1)
        if self.last is not None:
            rows = torch.arange(n, device=self.read.device)
            unwritten = ~self.seen.view(n, spans, self.span)[rows, self.last]
            tail = vectors[rows, :, self.last]
            vectors[rows, :, self.last] = tail.masked_fill_(unwritten[:, None, :, None], 0)
        return vectors.view(n, kv_heads, spans * self.span, -1)


def paged_attention(
    q_THD: Tensor, k_cache: PagedVectors, v_cache: PagedVectors, paging: Paging, scale: float
) -> Tensor:
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
    if len(paging.chunks) == 1:  # it is the whole batch, in its order
        return _attend(q_THD, k_cache, v_cache, paging.chunks[0], scale)
    out = torch.empty_like(q_THD)
    for chunk in paging.chunks:
        y = _attend(q_THD.index_select(0, chunk.rows), k_cache, v_cache, chunk, scale)
        out.index_copy_(0, chunk.rows, y)
    return out


def _attend(q: Tensor, k_cache: PagedVectors, v_cache: PagedVectors, chunk: Chunk, scale: float) -> Tensor:
    """Attention of one chunk: its queries `[n * length, heads, head_dim]` -> the same shape."""
    (n, kv_heads, _), dim = chunk.read.shape, q.shape[-1]
    k, v = (chunk.gathered(cache, q.dtype) for cache in (k_cache, v_cache))
    if chunk.length == 1:  # the heads of a group see the same keys: they are the queries of one head
        y = F.scaled_dot_product_attention(q.reshape(n, kv_heads, -1, dim), k, v, chunk.mask, scale=scale)
        return y.reshape(q.shape)
    q = q.reshape(chunk.length, kv_heads, -1, dim).permute(1, 2, 0, 3)
    k, v = (t[0, :, None].expand(-1, q.shape[1], -1, -1) for t in (k, v))
    y = F.scaled_dot_product_attention(q, k, v, chunk.mask, scale=scale)
    return y.permute(2, 0, 1, 3).reshape(chunk.length, -1, dim)
