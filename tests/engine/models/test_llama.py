"""Which tensors the Llama-like families ask for: names, shapes and biases. Law (g) has the arithmetic."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config

from qat.engine.layers import Embedding, Linear, RMSNorm
from qat.engine.models.llama import llama

SIZES: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 4,
}


class Asked:
    """Stands in for the weights and writes down what is asked of it."""

    def __init__(self) -> None:
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.biased: dict[str, bool] = {}

    def linear(self, prefix: str, parts: dict[str, int], columns: int, bias: bool = False) -> nn.Module:
        self.biased |= dict.fromkeys(parts, bias)
        return Linear(torch.zeros(sum(parts.values()), columns))

    def norm(self, name: str, size: int) -> RMSNorm:
        return RMSNorm(torch.ones(size), 1e-6)

    def embedding(self, name: str, rows: int, columns: int) -> Embedding:
        return Embedding(torch.zeros(rows, columns))

    def head(self, embedding: Embedding) -> nn.Module:
        return Linear(embedding.weight)


ALL = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.parametrize(
    ("config", "biased"),
    [
        (LlamaConfig(**SIZES), set()),
        (LlamaConfig(**SIZES, attention_bias=True), {"q_proj", "k_proj", "v_proj", "o_proj"}),
        (LlamaConfig(**SIZES, mlp_bias=True), {"gate_proj", "up_proj", "down_proj"}),
        (MistralConfig(**SIZES), set()),
        (Qwen2Config(**SIZES), {"q_proj", "k_proj", "v_proj"}),
    ],
    ids=["llama", "attention_bias", "mlp_bias", "mistral", "qwen2"],
)
def test_biases(config: PretrainedConfig, biased: set[str]) -> None:
    asked = Asked()
    model = llama(config, asked)  # type: ignore[arg-type]
    assert {name for name, bias in asked.biased.items() if bias} == biased
    assert set(asked.biased) == ALL
    layer = model.layers[0]
    assert layer.attention.qkv.weight.shape == (20, 12)
    assert layer.mlp.gate_up.weight.shape == (40, 12)
