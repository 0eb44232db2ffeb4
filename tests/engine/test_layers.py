"""The layers are transformers', operation by operation."""

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb

from qat.engine.layers import Concatenated, Linear, RMSNorm, Rotary
from qat.evaluation.precision import computing

ROPES = [
    {"rope_type": "default"},
    {"rope_type": "linear", "factor": 4.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
]
REFUSED = [
    {"rope_type": "dynamic", "factor": 2.0},
    {
        "rope_type": "longrope",
        "factor": 2.0,
        "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 8,
        "long_factor": [2.0] * 8,
    },
]


def rope_config(parameters: dict) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=128,
        rope_parameters={"rope_theta": 10_000.0, **parameters},
    )


@pytest.mark.parametrize("parameters", ROPES, ids=lambda p: p["rope_type"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation(parameters: dict, dtype: torch.dtype) -> None:
    config = rope_config(parameters)
    positions = torch.tensor([0, 1, 5, 127, 90])
    x = torch.randn(5, 4, 16).to(dtype)
    cos, sin = LlamaRotaryEmbedding(config)(x, positions[None])
    expected, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
    rotated = Rotary(config, torch.device("cpu"))(positions, dtype).apply(x)
    assert rotated.dtype == dtype
    torch.testing.assert_close(rotated, expected[0].transpose(0, 1), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("parameters", REFUSED, ids=lambda p: p["rope_type"])
def test_rotations_that_depend_on_the_length_are_refused(parameters: dict) -> None:
    with pytest.raises(ValueError, match=f"rope_type '{parameters['rope_type']}' is not served"):
        Rotary(rope_config(parameters), torch.device("cpu"))


def test_partial_rotation_is_refused() -> None:
    config = rope_config({"rope_type": "default", "partial_rotary_factor": 0.5})
    with pytest.raises(ValueError, match="partial_rotary_factor"):
        Rotary(config, torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm(dtype: torch.dtype) -> None:
    theirs = LlamaRMSNorm(64, eps=1e-5)
    theirs.weight.data = torch.randn(64)
    x = torch.randn(3, 64).to(dtype)
    y = RMSNorm(theirs.weight.data, 1e-5)(x)
    assert y.dtype == dtype
    torch.testing.assert_close(y, theirs(x).to(dtype), rtol=1e-6 if dtype == torch.float32 else 1e-2, atol=1e-6)


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
def test_linear_multiplies_in_the_dtype_of_x(storage: torch.dtype, bias: bool) -> None:
    weight, shift = torch.randn(24, 16).to(storage), torch.randn(24) if bias else None
    layer = Linear(weight, shift)
    assert layer.weight.data_ptr() == weight.data_ptr()  # kept as it is stored
    x = torch.randn(2, 3, 16)
    torch.testing.assert_close(layer(x), F.linear(x, weight.float(), shift))


def test_concatenated_puts_outputs_side_by_side() -> None:
    linears = [Linear(torch.randn(n, 8)) for n in (3, 5)]
    x = torch.randn(2, 8)
    assert torch.equal(Concatenated(linears)(x), torch.cat([linear(x) for linear in linears], -1))


@pytest.mark.parametrize("parameters", ROPES, ids=lambda p: p["rope_type"])
def test_in_fp64_nothing_is_narrower(parameters: dict) -> None:
    """The norm and the rotation, which are fp32 at least, against transformers' in fp64."""
    config, positions = rope_config(parameters), torch.tensor([0, 1, 5, 127, 90])
    x = torch.randn(5, 4, 16, dtype=torch.float64)
    rope, norm = LlamaRotaryEmbedding(config), LlamaRMSNorm(16, 1e-5)  # frequencies and weights stay fp32
    with computing(torch.float64):
        cos, sin = rope(x, positions[None])
        expected, _ = apply_rotary_pos_emb(x.transpose(0, 1)[None], x.transpose(0, 1)[None], cos, sin)
        normed = norm(x)
    rotated = Rotary(config, torch.device("cpu"))(positions, torch.float64).apply(x)
    torch.testing.assert_close(rotated, expected[0].transpose(0, 1), rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(RMSNorm(norm.weight.detach(), 1e-5)(x), normed, rtol=1e-13, atol=1e-13)
