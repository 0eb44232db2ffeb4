"""Qwen3: a Llama whose queries and keys are normed, head by head, before the rotation."""

import torch
from transformers import PretrainedConfig

from qat.engine.layers import MLP, Attention, Decoder, Layer, RMSNorm, Rotary
from qat.engine.weights import Weights


def qwen3(config: PretrainedConfig, weights: Weights) -> Decoder:
    """Builds the model that a config describes from the weights of its checkpoint."""
    hidden, inner, bias = config.hidden_size, config.intermediate_size, config.attention_bias
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    qkv = {"q_proj": heads * dim, "k_proj": kv_heads * dim, "v_proj": kv_heads * dim}

    def qk_norm(name: str) -> RMSNorm:
        q, k = weights.vector(f"{name}.q_norm.weight", dim), weights.vector(f"{name}.k_norm.weight", dim)
        return RMSNorm(torch.cat([q.expand(heads, dim), k.expand(kv_heads, dim)]), config.rms_norm_eps)

    def layer(name: str) -> Layer:
        attention = Attention(
            config,
            weights.linear(f"{name}.self_attn", qkv, hidden, bias),
            weights.linear(f"{name}.self_attn", {"o_proj": hidden}, heads * dim, bias),
            qk_norm(f"{name}.self_attn"),
        )
        mlp = MLP(
            weights.linear(f"{name}.mlp", {"gate_proj": inner, "up_proj": inner}, hidden),
            weights.linear(f"{name}.mlp", {"down_proj": hidden}, inner),
        )
        before, after = (weights.norm(f"{name}.{n}", hidden) for n in ("input_layernorm", "post_attention_layernorm"))
        return Layer(before, attention, after, mlp)

    embedding = weights.embedding("model.embed_tokens", config.vocab_size, hidden)
    layers = [layer(f"model.layers.{i}") for i in range(config.num_hidden_layers)]
    norm = weights.norm("model.norm", hidden)
    return Decoder(embedding, Rotary(config, weights.device), layers, norm, weights.head(embedding), weights.dtype)
