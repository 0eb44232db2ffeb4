"""Folding scales leaves the function alone, whatever absorbs them; what is folded is what stored tensors can say."""

import copy

import pytest
import torch
from tiny import tiny
from tiny_families import KINDS, family

from qat.models.families import structure_of
from qat.models.llama import LLAMA
from qat.surgery.fold import absorbed, fold, foldable
from qat.surgery.walk import Block

REPEATS = next(one for one in LLAMA.smoothings if one.repeats)


def block_of(model, index=0):
    return Block(f"model.layers.{index}", copy.deepcopy(model.model.layers[index]), [], [], model.model.layers[index])


@pytest.mark.parametrize("smoothing", LLAMA.smoothings, ids=lambda s: s.previous)
@pytest.mark.parametrize("name", KINDS)
def test_folding_leaves_the_function_alone(name, smoothing):
    """In fp64 and without quantization the logits do not move: GQA, biases and Gemma's norms included."""
    model, offset = family(name), structure_of(KINDS[name][0]).offset
    ids = torch.randint(0, 256, (2, 16))
    before = model(input_ids=ids).logits
    block = Block("model.layers.0", model.model.layers[0], [], [], model.model.layers[0])
    names = {n for s in LLAMA.smoothings for n in s.linears}
    weights = {n: block.module.get_parameter(f"{n}.weight").detach().clone() for n in names}
    size = weights[smoothing.linears[0]].shape[1]
    scales = absorbed(block, smoothing, torch.rand(size) * 3 + 0.2, torch.float64, offset).double()
    assert scales.std() > 0.1
    with torch.no_grad():
        changed = fold(block, smoothing, weights, scales, torch.float64, offset)
    stored = "norm" in smoothing.previous or name == "biased" or (name == "qwen2" and smoothing.repeats)
    assert len(changed) == stored
    after = model(input_ids=ids).logits
    assert not torch.equal(after, before)
    assert torch.allclose(after, before, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_a_norm_absorbs_exactly_what_its_rounded_weight_says(kind):
    model, offset = family(kind).float(), structure_of(kind).offset
    block, smoothing = block_of(model), LLAMA.smoothings[0]
    wanted = torch.rand(64) * 3 + 0.2
    scales = absorbed(block, smoothing, wanted, torch.bfloat16, offset)
    assert torch.allclose(scales, wanted, rtol=2**-8 * (1 + 2 * offset * 3))
    assert not torch.equal(scales, wanted)
    weights = {n: block.module.get_parameter(f"{n}.weight").clone() for n in smoothing.linears}
    old = block.module.input_layernorm.weight.clone() + offset
    with torch.no_grad():
        changed = fold(block, smoothing, weights, scales, torch.bfloat16, offset)
    stored = changed["model.layers.0.input_layernorm.weight"]
    assert stored.dtype == torch.bfloat16
    assert torch.allclose((stored.float() + offset) * scales, old, rtol=1e-6)


def test_a_value_channel_takes_the_geometric_mean_of_what_its_query_heads_want():
    block, wanted = block_of(tiny()), torch.rand(64) * 3 + 0.2
    scales = absorbed(block, REPEATS, wanted, torch.float64).reshape(2, 2, 16)  # kv heads, queries of each, channels
    heads = wanted.reshape(2, 2, 16)
    assert torch.equal(scales[:, 0], scales[:, 1])
    assert torch.allclose(scales[:, 0], (heads[:, 0] * heads[:, 1]).sqrt())


def test_scales_that_a_norm_cannot_say_are_left_out():
    """A weight of zero, or one that its rounding would make zero, infinite or of another sign."""
    model = tiny()
    norm = model.model.layers[0].input_layernorm.weight
    with torch.no_grad():
        norm[0] = 0
    wanted = torch.full((64,), 2.0)
    wanted[1] = 1e38
    wanted[2] = 1e-39
    found = absorbed(block_of(model), LLAMA.smoothings[0], wanted, torch.float16)
    assert found[:3].tolist() == [1, 1, 1]
    assert torch.allclose(found[3:], wanted[3:], rtol=1e-3)


def test_a_matrix_that_stays_unquantized_absorbs_nothing():
    block = block_of(tiny())
    weights = {n: torch.empty(0) for s in LLAMA.smoothings for n in s.linears}
    assert all(foldable(block, one, weights) for one in LLAMA.smoothings)
    del weights["self_attn.v_proj"]
    assert [foldable(block, one, weights) for one in LLAMA.smoothings] == [False, False, True, True]
