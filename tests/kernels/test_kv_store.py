"""Every token lands in its slot, and nowhere else."""

import pytest
import torch

from qat.kernels.kv_store import kv_store


@pytest.mark.parametrize("block_size", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_writes_the_named_slots_only(block_size: int, dtype: torch.dtype) -> None:
    blocks, heads, dim = 24 // block_size, 3, 5
    k_cache = torch.full((blocks, heads, block_size, dim), torch.nan, dtype=dtype)
    v_cache = k_cache.clone()
    k, v = torch.randn(5, heads, dim), torch.randn(5, heads, dim)
    slots = torch.tensor([23, 11, 0, 7, 12])
    kv_store(k, v, k_cache, v_cache, slots)
    for token, slot in enumerate(slots.tolist()):
        assert torch.equal(k_cache[slot // block_size, :, slot % block_size], k[token].to(dtype))
        assert torch.equal(v_cache[slot // block_size, :, slot % block_size], v[token].to(dtype))
    assert int((~k_cache.isnan()).sum()) == int((~v_cache.isnan()).sum()) == 5 * heads * dim
