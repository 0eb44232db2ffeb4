"""Llama, and the families that differ from it in biases only: Mistral, Qwen2 and Qwen2.5."""

from transformers import PretrainedConfig

from qat.engine.layers import MLP, Attention, Decoder, Layer, Rotary
from qat.engine.weights import Weights


def llama(config: PretrainedConfig, weights: Weights) -> Decoder:
    """Builds the model that a config describes from the weights of its checkpoint."""
    attention_bias = config.model_type == "llama" and config.attention_bias
    qkv_bias = attention_bias or config.model_type == "qwen2"
    mlp_bias = config.model_type == "llama" and config.mlp_bias
    hidden, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads = (n * config.head_dim for n in (config.num_attention_heads, config.num_key_value_heads))
    qkv = {"q_proj": heads, "k_proj": kv_heads, "v_proj": kv_heads}

    def layer(name: str) -> Layer:
        attention = Attention(
            config,
            weights.linear(f"{name}.self_attn", qkv, hidden, qkv_bias),
            weights.linear(f"{name}.self_attn", {"o_proj": hidden}, heads, attention_bias),
        )
        mlp = MLP(
            weights.linear(f"{name}.mlp", {"gate_proj": inner, "up_proj": inner}, hidden, mlp_bias),
            weights.linear(f"{name}.mlp", {"down_proj": hidden}, inner, mlp_bias),
        )
        before, after = (weights.norm(f"{name}.{n}", hidden) for n in ("input_layernorm", "post_attention_layernorm"))
        return Layer(before, attention, after, mlp)

    embedding = weights.embedding("model.embed_tokens", config.vocab_size, hidden)
    layers = [layer(f"model.layers.{i}") for i in range(config.num_hidden_layers)]
    norm = weights.norm("model.norm", hidden)
    return Decoder(embedding, Rotary(config, weights.device), layers, norm, weights.head(embedding), weights.dtype)
