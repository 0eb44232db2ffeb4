"""Names and row order are llama.cpp's, as its own package and transformers have them."""

import gguf
import numpy as np
import pytest
import torch
from tiny import tiny
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

from qat.models.gguf_names import ARCHITECTURES, architecture, metadata, our_name, row_order, their_name

LLAMA = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 64}


@pytest.mark.parametrize("model", ["llama", "qwen3"])
def test_names_are_the_packages_and_come_back(model):
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    if model == "llama":
        own = tiny(attention_bias=True, tied=False)
    else:
        own = Qwen3ForCausalLM(Qwen3Config(vocab_size=8, intermediate_size=32, num_hidden_layers=2, **sizes))
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == model)
    names = gguf.get_tensor_name_map(arch, 2)
    for name in own.state_dict():
        theirs = their_name(name)
        assert theirs == names.get_name(name, try_suffixes=(".weight", ".bias")), name
        assert our_name(theirs) == name


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.sinks", "rotary.weight", "model.layers.x.mlp.up_proj.weight"]
)
def test_a_parameter_without_a_name_is_refused(name):
    with pytest.raises(ValueError, match=f"^{name.rpartition('.')[0]}: GGUF has no name for it"):
        their_name(name)


@pytest.mark.parametrize(
    "name", ["blk.0.ffn_gate_exps.weight", "rope_freqs.weight", "attn_q.weight", "blk.1.output.weight"]
)
def test_a_tensor_of_no_family_is_refused(name):
    with pytest.raises(ValueError, match=f"^tensor {name} is none of the architectures llama, qwen2, qwen3"):
        our_name(name)


@pytest.mark.parametrize(("part", "heads"), [("q_proj.weight", 4), ("k_proj.weight", 2), ("k_proj.bias", 2)])
def test_rows_are_ordered_as_transformers_puts_them_back(part, heads):
    ours = np.random.default_rng(0).standard_normal((heads * 16, 5) if "weight" in part else heads * 16)
    theirs = ours[row_order(f"model.layers.1.self_attn.{part}", LLAMA).numpy()]
    assert not np.array_equal(theirs, ours)
    processor = LlamaTensorProcessor(config=LLAMA)
    back = processor.process(theirs, f"blk.1.attn_{part.replace('_proj', '')}").weights
    assert np.array_equal(back, ours)


def test_other_rows_and_other_families_stay():
    for name in ("v_proj.weight", "o_proj.weight"):
        assert row_order(f"model.layers.0.self_attn.{name}", LLAMA) is None
    for other in set(ARCHITECTURES) - {"LlamaForCausalLM"}:
        assert row_order("model.layers.0.self_attn.q_proj", LLAMA | {"architectures": [other]}) is None


def test_what_the_file_could_not_say_is_refused():
    config = tiny().config.to_dict() | {"architectures": ["LlamaForCausalLM"]}
    found = metadata(config)
    assert found["llama.attention.key_length"] == 16
    assert found["llama.rope.freq_base"] == config["rope_parameters"]["rope_theta"]
    with pytest.raises(ValueError, match=r"GGUF is written for LlamaForCausalLM, .* not for GemmaForCausalLM"):
        architecture(config | {"architectures": ["GemmaForCausalLM"]})
    with pytest.raises(ValueError, match="rope_type 'llama3' is not written to GGUF"):
        metadata(config | {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}})
    assert torch.equal(
        row_order("model.layers.0.self_attn.q_proj", config), row_order("x.self_attn.q_proj.weight", LLAMA)
    )
