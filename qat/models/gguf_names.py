"""What llama.cpp calls a model family's parameters, how it orders their rows, and what it must be told of the rest.

Rows of Llama's q_proj and k_proj are interleaved within each head: llama.cpp rotates neighbours there, where Hugging
Face rotates halves. Qwen's stay as they are.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qat.numerics.kv import head_dim

ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
INTERLEAVED = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}  # in llama alone
OUTER = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
BACK = {theirs: ours for ours, theirs in (OUTER | INNER).items()}


def their_name(name: str) -> str:
    """GGUF's name of a parameter.

    Raises:
        ValueError: It has none.
    """
    module, _, kind = name.rpartition(".")
    hit = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
    theirs = (INNER if hit else OUTER).get(hit[2] if hit else module)
    if theirs is None:
        raise ValueError(f"{module}: GGUF has no name for it; {', '.join(ARCHITECTURES)} can be exported")
    return f"blk.{hit[1]}.{theirs}.{kind}" if hit else f"{theirs}.{kind}"


def our_name(name: str) -> str:
    """The inverse of `their_name`.

    Raises:
        ValueError: No such parameter.
    """
    module, _, kind = name.rpartition(".")
    hit = re.fullmatch(r"blk\.(\d+)\.(.+)", module)
    ours = BACK.get(hit[2] if hit else module)
    if ours is None or (ours in INNER) is not bool(hit):
        raise ValueError(f"tensor {name} is none of the architectures {', '.join(ARCHITECTURES.values())}")
    return f"model.layers.{hit[1]}.{ours}.{kind}" if hit else f"{ours}.{kind}"


def row_order(name: str, config: Mapping[str, Any]) -> Tensor | None:
    """Which row of ours each of GGUF's rows is: halves of every head interleaved; None where rows stay."""
    heads = next((key for part, key in INTERLEAVED.items() if f".self_attn.{part}" in name), None)
    if heads is None or ARCHITECTURES[architecture(config)] != "llama":
        return None
    count, size = config.get(heads) or config["num_attention_heads"], head_dim(config)
    return torch.arange(count * size).reshape(count, 2, size // 2).transpose(1, 2).flatten()


def architecture(config: Mapping[str, Any]) -> str:
    """The model's class.

    Raises:
        ValueError: It is none that the format is written for.
    """
    name = (config.get("architectures") or ["none"])[0]
    if name not in ARCHITECTURES:
        raise ValueError(f"model: GGUF is written for {', '.join(ARCHITECTURES)}, not for {name}")
    return str(name)


def metadata(config: Mapping[str, Any]) -> dict[str, int | float]:
    """The key-value pairs that say what the architecture is.

    Raises:
        ValueError: The architecture, or its rotary embedding, is none that the file could say.
    """
    rope = config["rope_parameters"]
    if rope.get("rope_type", "default") != "default":
        raise ValueError(f"model: rope_type {rope['rope_type']!r} is not written to GGUF; only the default one is")
    a, size = ARCHITECTURES[architecture(config)], head_dim(config)
    return {
        f"{a}.block_count": config["num_hidden_layers"],
        f"{a}.context_length": config["max_position_embeddings"],
        f"{a}.embedding_length": config["hidden_size"],
        f"{a}.feed_forward_length": config["intermediate_size"],
        f"{a}.attention.head_count": config["num_attention_heads"],
        f"{a}.attention.head_count_kv": config["num_key_value_heads"],
        f"{a}.attention.key_length": size,
        f"{a}.attention.value_length": size,
        f"{a}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{a}.rope.dimension_count": size,
        f"{a}.rope.freq_base": float(rope["rope_theta"]),
        f"{a}.vocab_size": config["vocab_size"],
    }
