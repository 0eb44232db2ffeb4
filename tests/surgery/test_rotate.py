"""A rotated model is the same function in fp64, whatever the family; what cannot be rotated is refused by name."""

import copy

import pytest
import torch
from tiny import tiny
from tiny_families import KINDS, family

from qat.models.families import structure_of
from qat.surgery.convert import apply
from qat.surgery.rotate import rotated

IDS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(1))
PARTS = {"both": (True, True), "residual": (True, False), "values": (False, True)}


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def logits(model, moved=None):
    return apply(model, {}, moved or {})(input_ids=IDS).logits


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize("name", KINDS)
def test_a_rotation_leaves_the_function_alone(name, parts, kind):
    """GQA, biases and Gemma's norms included; and it is not the identity that does so."""
    model = family(name, tie_word_embeddings=False)
    before = copy.deepcopy(model.state_dict())
    moved = rotated(model, kind, *PARTS[parts], seed=0)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert all(not torch.allclose(value, before[key], atol=1e-3) for key, value in moved.items())
    after = logits(model, moved)
    assert not torch.equal(after, logits(model))
    assert torch.allclose(after, logits(model), rtol=0, atol=1e-10)


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
def test_each_block_has_a_rotation_of_its_own_for_all_of_its_value_heads(kind):
    """R2, found from the weights: `V' = R^T V`."""
    model, found = family("llama"), []
    moved = rotated(model, kind, False, True, seed=0)
    size = model.model.layers[0].self_attn.head_dim
    for name in (f"model.layers.{i}.self_attn.v_proj.weight" for i in (0, 1)):
        before, after = (w.double().unflatten(0, (-1, size)) for w in (model.get_parameter(name), moved[name]))
        matrices = (after @ torch.linalg.pinv(before)).mT
        assert len(matrices) == 2
        assert torch.allclose(matrices[0], matrices[1], atol=1e-8)
        assert torch.allclose(matrices[0] @ matrices[0].T, torch.eye(size).double(), atol=1e-8)
        found.append(matrices[0])
    assert float((found[0] - found[1]).abs().max()) > 0.1


@pytest.mark.parametrize("name", KINDS)
def test_everything_that_touches_the_stream_moves_and_nothing_else(name):
    model = family(name, tie_word_embeddings=False)
    moved, offset = rotated(model, "orthogonal", True, True, 0), structure_of(KINDS[name][0]).offset
    left = {key for key, _ in model.named_parameters()} - set(moved)
    assert {key.rpartition("self_attn.")[2] for key in left} <= {
        "q_norm.weight", "k_norm.weight", "q_proj.bias", "k_proj.bias"} | {
        f"model.layers.{i}.mlp.{part}_proj.bias" for i in (0, 1) for part in ("gate", "up")}  # fmt: skip
    norms = {key for key in moved if key.endswith("norm.weight")}
    assert len(norms) == 5
    assert all(bool((moved[key] + offset == 1).all()) for key in norms)


@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_a_tied_head_follows_if_the_last_norms_weight_is_one_number(name):
    """That norm stays, and so does the tie."""
    model = family(name, tie_word_embeddings=True)
    model.model.norm.weight.fill_(1.5)
    moved = rotated(model, "hadamard", True, True, 0)
    assert "model.norm.weight" not in moved
    assert "lm_head.weight" not in moved
    after = apply(model, {}, moved)
    assert after.lm_head.weight is after.model.embed_tokens.weight
    assert torch.allclose(after(input_ids=IDS).logits, logits(model), rtol=0, atol=1e-10)


def test_a_tied_head_cannot_follow_otherwise_and_is_refused():
    """Neither fusing nor leaving the norm is right; values alone can still be rotated."""
    model = family("llama", tie_word_embeddings=True)
    with pytest.raises(ValueError, match=r"model\.norm: its weight is not one number .*model\.untie=true"):
        rotated(model, "hadamard", True, True, 0)
    assert torch.allclose(logits(model, rotated(model, "hadamard", False, True, 0)), logits(model), rtol=0, atol=1e-10)
    even = family("llama", tie_word_embeddings=True)
    even.model.norm.weight.fill_(1.0)
    moved = rotated(even, "hadamard", True, False, 0)  # as if the norm's weight did not matter
    assert not torch.allclose(logits(model, moved), logits(model), atol=1e-2)


def test_an_outlying_channel_of_the_stream_is_spread():
    model = tiny(tied=False)
    model.model.embed_tokens.weight[:, 7] *= 50
    table = model.model.embed_tokens.weight[1:]
    spread = rotated(model, "hadamard", True, False, 0)["model.embed_tokens.weight"][1:]  # row 0 is padding: zeros
    assert float((table.abs().amax(1) / table.norm(dim=1)).mean()) > 0.8
    assert float((spread.abs().amax(1) / spread.norm(dim=1)).mean()) < 0.3


def test_tensors_are_rounded_once_to_the_parameters_dtype_or_to_fp32():
    """A bf16 model's weights are not rounded to bf16 before they are quantized."""
    model, wide = tiny(tied=False), tiny(tied=False).double()
    exact = rotated(wide, "hadamard", True, True, 0)
    for found in (
        rotated(model, "hadamard", True, True, 0),
        rotated(tiny(tied=False).bfloat16(), "hadamard", True, True, 0),
    ):
        assert found.keys() == exact.keys()
        for key, value in found.items():
            expected = exact[key].to(value.dtype)
            assert torch.equal(value, expected), key
            assert value.dtype == torch.float32


def test_a_seed_is_a_rotation():
    model = tiny(tied=False)
    first, again, other = (rotated(model, "hadamard", True, True, seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_what_cannot_be_rotated_is_named():
    with pytest.raises(ValueError, match="nothing would be rotated"):
        rotated(tiny(), "hadamard", False, False, 0)
    model = family("llama", hidden_size=72, tie_word_embeddings=False)
    rotated(model, "hadamard", True, True, 0)
    model = family("llama", hidden_size=52, tie_word_embeddings=False)
    with pytest.raises(ValueError, match=r"residual: no Hadamard matrix of order 52 .* use kind=orthogonal"):
        rotated(model, "hadamard", True, True, 0)
    assert torch.allclose(logits(model, rotated(model, "orthogonal", True, True, 0)), logits(model), rtol=0, atol=1e-10)
