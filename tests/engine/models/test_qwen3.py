"""Qwen3 norms each head with its own weights, queries and keys in one go. Law (g) has the arithmetic."""

from collections.abc import Callable

import torch

from qat.engine.config import EngineConfig
from qat.engine.loader import load


def test_heads_of_queries_and_keys_have_their_norms(saved: Callable) -> None:
    checkpoint = saved("qwen3")
    layer = load(checkpoint.path, EngineConfig(device="cpu")).model.layers[1]
    theirs = checkpoint.model.model.layers[1].self_attn
    qk = torch.randn(3, 6, 32)
    expected = torch.cat([theirs.q_norm(qk[:, :4]), theirs.k_norm(qk[:, 4:])], 1)
    torch.testing.assert_close(layer.attention.qk_norm(qk), expected)
