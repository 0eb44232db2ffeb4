"""The Llama block: attention and a gated MLP, each behind an RMSNorm. Mistral, Qwen2 and Qwen3 have it too."""

from qat.models.structure import Smoothing, Structure

LLAMA = Structure(
    blocks="model.layers",
    stages=(
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    ),
    smoothings=(
        Smoothing("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), "self_attn"),
        Smoothing("self_attn.v_proj", ("self_attn.o_proj",), "self_attn.o_proj", repeats=True),
        Smoothing("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj"), "mlp"),
        Smoothing("mlp.up_proj", ("mlp.down_proj",), "mlp.down_proj"),  # exact: SwiGLU is linear in `up`
    ),
    norm="model.norm",
)
