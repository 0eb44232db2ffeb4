"""Every token lands in its slot, and nowhere else; and comes back as training saw it."""

import pytest
import torch

from qat.kernels.kv_quant import fake_quantize_kv
from qat.kernels.kv_store import PagedVectors, kv_store
from qat.numerics.kv import KINDS, vector_bytes

CPU = torch.device("cpu")


def places(slots: torch.Tensor, heads: int, block_size: int) -> torch.Tensor:
    """Where the vectors of slots lie in a flattened cache: `[slots * heads]`."""
    block, offset = slots // block_size, slots % block_size
    return ((block[:, None] * heads + torch.arange(heads)) * block_size + offset[:, None]).flatten()


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_writes_the_named_slots_only(block_size: int, dtype: torch.dtype) -> None:
    blocks, heads, dim = 24 // block_size, 3, 5
    shape = (blocks, heads, block_size, dim)
    k_cache, v_cache = (PagedVectors(torch.full(shape, torch.nan, dtype=dtype)) for _ in range(2))
    k, v = torch.randn(5, heads, dim), torch.randn(5, heads, dim)
    slots = torch.tensor([23, 11, 0, 7, 12])
    kv_store(k, v, k_cache, v_cache, slots)
    for token, slot in enumerate(slots.tolist()):
        assert torch.equal(k_cache.data[slot // block_size, :, slot % block_size], k[token].to(dtype))
        assert torch.equal(v_cache.data[slot // block_size, :, slot % block_size], v[token].to(dtype))
    assert int((~k_cache.data.isnan()).sum()) == int((~v_cache.data.isnan()).sum()) == 5 * heads * dim


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("block_size", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_read_back_is_what_training_saw(kind: str | None, block_size: int, dtype: torch.dtype) -> None:
    heads, dim, tokens = 3, 24, 17
    shape = (-(-40 // block_size), heads, block_size, dim)
    k_cache, v_cache = (PagedVectors.empty(shape, kind, dtype, CPU) for _ in range(2))
    k, v = (torch.randn(tokens, heads, dim, generator=torch.Generator().manual_seed(i)).to(dtype) for i in (0, 1))
    slots = torch.randperm(40, generator=torch.Generator().manual_seed(2))[:tokens]
    for part in (slice(0, 5), slice(5, 6), slice(6, tokens)):  # as chunks come
        kv_store(k[part], v[part], k_cache, v_cache, slots[part])
    where = places(slots, heads, block_size)
    for cache, x in ((k_cache, k), (v_cache, v)):
        found = cache.read(where, 1, dtype).view(tokens, heads, dim)
        assert found.dtype == dtype
        assert torch.equal(found, x if kind is None else fake_quantize_kv(x, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_slots_are_written_alone(kind: str) -> None:
    caches = [PagedVectors.empty((6, 2, 4, 16), kind, torch.float32, CPU) for _ in range(2)]
    for cache in caches:
        cache.data.fill_(0)
        cache.scale.fill_(torch.nan)
    kv_store(torch.randn(2, 2, 16), torch.randn(2, 2, 16), *caches, torch.tensor([23, 0]))
    for cache in caches:
        written = {(int(block), int(slot)) for block, _, slot in (~cache.scale.isnan()).nonzero()}
        assert written == {(5, 3), (0, 0)}
        assert {(int(block), int(slot)) for block, _, slot, _ in cache.data.nonzero()} == written


@pytest.mark.parametrize("kind", KINDS)
def test_bytes(kind: str) -> None:
    cache = PagedVectors.empty((7, 2, 4, 16), kind, torch.bfloat16, CPU)
    assert cache.nbytes == 7 * 2 * 4 * vector_bytes(kind, 16)
    assert PagedVectors.empty((7, 2, 4, 16), None, torch.bfloat16, CPU).nbytes == 7 * 2 * 4 * 32
