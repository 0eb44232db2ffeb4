"""Law (d): paged attention equals plain attention over the same tokens, for ragged mixes, whatever lies unused."""

import random

import pytest
import torch

from qat.kernels.kv_quant import fake_quantize_kv
from qat.kernels.kv_store import PagedVectors, kv_store
from qat.kernels.paged_attention import Paging, paged_attention
from qat.numerics.kv import KINDS

HEADS, KV_HEADS, DIM, SCALE = 6, 2, 8, 0.3


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of the last tokens of one sequence in fp64: q [t, heads, d], k and v [c, kv_heads, d]."""
    k, v = (x.double().repeat_interleave(HEADS // KV_HEADS, 1) for x in (k, v))
    scores = torch.einsum("thd,chd->htc", q.double(), k) * SCALE
    seen = torch.arange(len(k)) <= torch.arange(len(k) - len(q), len(k))[:, None]
    return torch.einsum("htc,chd->thd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


def poisoned(shape: tuple[int, ...], kind: str | None) -> PagedVectors:
    """A cache whose unused slots are NaN."""
    cache = PagedVectors.empty(shape, kind, torch.float32, torch.device("cpu"))
    (cache.data if cache.scale is None else cache.scale).fill_(torch.nan)
    return cache


def batch(
    lengths: list[tuple[int, int]], block_size: int, kind: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sequences of (tokens brought, context) in a cache full of NaN: their output, and what it should be."""
    torch.manual_seed(len(lengths) * block_size)
    needed = [-(-context // block_size) for _, context in lengths]
    blocks = random.Random(0).sample(range(sum(needed) + 3), sum(needed))
    shape = (sum(needed) + 3, KV_HEADS, block_size, DIM)
    k_cache, v_cache = poisoned(shape, kind), poisoned(shape, kind)
    tables = torch.full((len(lengths), max(needed)), 10**6)
    expected, queries, slots = [], [], []
    for i, (length, context) in enumerate(lengths):
        table, blocks = blocks[: needed[i]], blocks[needed[i] :]
        tables[i, : len(table)] = torch.tensor(table)
        own = torch.tensor([table[p // block_size] * block_size + p % block_size for p in range(context)])
        k, v = torch.randn(context, KV_HEADS, DIM), torch.randn(context, KV_HEADS, DIM)
        kv_store(k, v, k_cache, v_cache, own)
        queries.append(torch.randn(length, HEADS, DIM))
        slots.append(own[context - length :])
        expected.append(plain(queries[-1], *(x if kind is None else fake_quantize_kv(x, kind) for x in (k, v))))
    paging = Paging(torch.cat(slots), tables, [n for n, _ in lengths], [c for _, c in lengths], shape)
    return paged_attention(torch.cat(queries), k_cache, v_cache, paging, SCALE), torch.cat(expected)


@pytest.mark.parametrize("block_size", [1, 3, 4, 16])
@pytest.mark.parametrize(
    "lengths",
    [
        [(1, 1)],
        [(1, 9)],
        [(5, 5)],
        [(2, 7)],
        [(1, 3), (1, 40), (1, 17), (1, 16), (1, 1)],
        [(4, 4), (1, 6), (3, 20), (1, 7), (1, 33), (16, 16)],
    ],
    ids=str,
)
def test_equals_plain_attention(block_size: int, lengths: list[tuple[int, int]]) -> None:
    y, expected = batch(lengths, block_size)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_a_quantized_cache_is_read_as_training_saw_it_the_current_tokens_too(block_size: int, kind: str) -> None:
    y, expected = batch([(4, 4), (1, 6), (3, 20), (1, 7), (1, 1)], block_size, kind)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)


def test_padding_at_most_doubles_the_work() -> None:
    contexts = [1, 2, 3, 8, 9, 60, 64, 100, 127]
    slots = torch.arange(len(contexts))
    tables = torch.arange(len(contexts) * 127).view(len(contexts), 127)
    paging = Paging(slots, tables, [1] * len(contexts), contexts, (9999, 2, 1, DIM))
    assert sum(chunk.read[:, 0].numel() for chunk in paging.chunks) < 2 * sum(contexts)
    assert sorted(torch.cat([chunk.rows for chunk in paging.chunks]).tolist()) == slots.tolist()


def test_half_precision_queries() -> None:
    k_cache = torch.randn(2, KV_HEADS, 4, DIM).bfloat16()
    v_cache = torch.randn(2, KV_HEADS, 4, DIM).bfloat16()
    q = torch.randn(1, HEADS, DIM).bfloat16()
    y = paged_attention(
        q,
        PagedVectors(k_cache),
        PagedVectors(v_cache),
        Paging(torch.tensor([6]), torch.tensor([[0, 1]]), [1], [7], k_cache.shape),
        SCALE,
    )
    k, v = (c.transpose(1, 2).reshape(8, KV_HEADS, DIM)[:7] for c in (k_cache, v_cache))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), plain(q, k, v), rtol=2e-2, atol=2e-2)
