import torch
from transformers import GemmaConfig, GemmaForCausalLM

from qat.models.gemma import GEMMA


def test_norms_multiply_by_one_more_than_their_weight():
    config = GemmaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8,
                         num_key_value_heads=1, vocab_size=8)  # fmt: skip
    norm = GemmaForCausalLM(config).get_submodule(GEMMA.norm)
    x = torch.randn(3, 8)
    rms = x / x.square().mean(-1, keepdim=True).sqrt()
    with torch.no_grad():
        norm.weight.normal_()
    assert torch.allclose(norm(x), rms * (GEMMA.offset + norm.weight), atol=1e-4)
