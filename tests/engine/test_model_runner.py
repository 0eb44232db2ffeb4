"""The pool is as large as its memory, and never larger than it could be used."""

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from qat.engine.config import EngineConfig, SamplingParams
from qat.engine.loader import load
from qat.engine.model_runner import ModelRunner, block_tables, num_blocks
from qat.engine.scheduler import Chunk
from qat.engine.sequence import Sequence
from qat.nn.kv import quantize_kv
from qat.numerics.kv import KINDS, vector_bytes

GIB = 2**30
TOKEN = 2 * 2 * 2 * 16 * 4  # keys and values, two layers, two heads of sixteen floats


def config(**fields) -> EngineConfig:
    return EngineConfig(device="cpu", kernel="reference", **fields)


def test_blocks_of_the_memory(saved: Callable) -> None:
    loaded = load(saved("llama").path, config())
    for blocks in (1, 2, 7):
        memory = config(block_size=8, kv_memory_gib=(blocks * 8 * TOKEN + 1) / GIB)
        assert num_blocks(loaded, memory) == blocks
    assert num_blocks(loaded, config(block_size=8, kv_memory_gib=1, max_num_seqs=3)) == 3 * 128 // 8
    assert num_blocks(loaded, config(block_size=8, num_blocks=999)) == 999


def test_memory_that_holds_no_block(saved: Callable) -> None:
    loaded = load(saved("llama").path, config())
    with pytest.raises(ValueError, match=r"kv_memory_gib=1e-06: one block of 8 tokens takes 0\.000004 GiB"):
        ModelRunner(loaded, config(block_size=8, kv_memory_gib=1e-6))


def test_caches_have_the_blocks(saved: Callable) -> None:
    runner = ModelRunner(load(saved("llama").path, config()), config(block_size=8, num_blocks=5))
    assert len(runner.caches) == 2
    assert all(cache.data.shape == (5, 2, 8, 16) for pair in runner.caches for cache in pair)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_a_quantized_cache(saved: Callable, kind: str) -> None:
    """As many as the memory holds, codes and scales counted; and they take no more than that."""
    vectors = 2 * 2 * 2 * 8  # keys and values, two layers, two heads, eight tokens
    for blocks in (1, 7):
        asked = config(block_size=8, kv_memory_gib=(blocks * vectors * vector_bytes(kind, 16) + 1) / GIB, kv=kind)
        runner = ModelRunner(load(saved("llama").path, asked), asked)
        assert runner.num_blocks == blocks
        assert sum(cache.nbytes for pair in runner.caches for cache in pair) <= asked.kv_memory_gib * GIB
    memory = {"block_size": 8, "kv_memory_gib": 20 * 8 * TOKEN / GIB}
    plain, quantized = config(**memory), config(**memory, kv=kind)
    gain = num_blocks(load(saved("llama").path, quantized), quantized) / num_blocks(
        load(saved("llama").path, plain), plain
    )
    assert gain == {"int8": 3.2, "int4": 5.3, "fp8": 3.2}[kind]


@pytest.mark.parametrize("kind", [None, *KINDS])
def test_what_lies_unused_is_never_read(saved: Callable, kind: str | None) -> None:
    checkpoint = saved("llama")
    asked = config(block_size=4, num_blocks=8, kv=kind or "none")
    runner = ModelRunner(load(checkpoint.path, asked), asked)
    for pair in runner.caches:
        for cache in pair:
            (cache.data if cache.scale is None else cache.scale).fill_(torch.nan)
    tokens = [5, 6, 7, 8, 9, 10]
    sequence = Sequence(0, tuple(tokens), SamplingParams(), 10, block_table=[6, 1])
    hidden = runner.forward([Chunk(sequence, 0, 5)])
    hidden = torch.cat([hidden, runner.forward([Chunk(sequence, 5, 6)])])
    model = copy.deepcopy(checkpoint.model)
    quantize_kv(model, None if kind is None else KINDS[kind])
    expected = replace(checkpoint, model=model).logits(tokens)
    torch.testing.assert_close(runner.logits(hidden), expected, rtol=1e-4, atol=1e-3)


def test_the_reference_keeps_its_precision(saved: Callable) -> None:
    path = saved("llama").path
    seen: list[str] = []
    before = torch.get_float32_matmul_precision()
    for kernel in ("reference", "auto"):
        fields = EngineConfig(device="cpu", kernel=kernel, num_blocks=8)
        runner = ModelRunner(load(path, fields), fields)
        runner.model.norm.register_forward_hook(lambda *_: seen.append(torch.get_float32_matmul_precision()))
        try:
            torch.set_float32_matmul_precision("high")
            runner.logits(torch.randn(1, 64))
            assert torch.get_float32_matmul_precision() == "high"
        finally:
            torch.set_float32_matmul_precision(before)
    assert seen == ["highest", "high"]


def test_tables_are_filled_up() -> None:
    assert block_tables([[3, 1], [2], [9, 8, 7]]).tolist() == [[3, 1, 0], [2, 0, 0], [9, 8, 7]]
