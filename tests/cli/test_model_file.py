import json
import struct

import gguf
import numpy as np
import pytest

from qat.cli.model_file import read_model


@pytest.fixture
def small_gguf(tmp_path):
    path = tmp_path / "small.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_token_list([f"token {i}" for i in range(100)])
    writer.add_array("numbers", [1, 2, 3])
    writer.add_float32("a.float", 0.5)
    writer.add_bool("a.bool", True)
    for name, shape in {
        "token_embd.weight": (100, 48),
        "blk.0.attn_q.weight": (64, 48),
        "blk.0.ffn_down.weight": (48, 96),
        "blk.0.attn_norm.weight": (48,),
        "output.weight": (100, 48),
    }.items():
        writer.add_tensor(name, np.zeros(shape, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def directory(tmp_path, config, tensors=None, weights="model.safetensors"):
    (tmp_path / "config.json").write_text(json.dumps(config))
    header = {name: {"dtype": "F32", "shape": shape, "data_offsets": [0, 0]} for name, shape in (tensors or {}).items()}
    data = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    (tmp_path / weights).write_bytes(struct.pack("<Q", len(data)) + data)
    return tmp_path


LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def test_gguf_header(small_gguf):
    facts = read_model(small_gguf)
    assert facts.context == 128
    assert facts.linears == {
        "model.layers.0.self_attn.q_proj": (64, 48),
        "model.layers.0.mlp.down_proj": (48, 96),
        "lm_head": (100, 48),
    }
    assert facts.embeddings == {"model.embed_tokens": (100, 48)}


@pytest.mark.parametrize("size", [3, 10, 30, 200])
def test_a_gguf_file_that_ends_early_is_refused(small_gguf, size):
    small_gguf.write_bytes(small_gguf.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"is damaged|is no model"):
        read_model(small_gguf)


def test_directory_with_safetensors(tmp_path):
    tensors = {"model.embed_tokens.weight": [9, 64], "h.0.attn.weight": [32, 64], "h.0.norm.weight": [64], "b": [1, 2]}
    facts = read_model(directory(tmp_path, LLAMA, tensors))
    assert facts.context == 128
    assert facts.linears == {"h.0.attn": (32, 64)}
    assert facts.embeddings == {"model.embed_tokens": (9, 64)}


def test_shapes_from_a_config_are_those_of_the_model(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**LLAMA, vocab_size=32, num_hidden_layers=1))
    real = {n: tuple(p.shape) for n, p in model.named_parameters() if n.endswith("_proj.weight")}
    facts = read_model(directory(tmp_path, LLAMA | {"vocab_size": 32}, weights="pytorch_model.bin"))
    assert {f"{name}.weight": shape for name, shape in facts.linears.items()} == real
    assert facts.embeddings == {"model.embed_tokens": (32, 64)}


def test_an_unknown_family_without_headers_gives_no_shapes(tmp_path):
    facts = read_model(directory(tmp_path, {"n_embd": 64}, weights="pytorch_model.bin"))
    assert (facts.context, facts.linears) == (None, {})


def test_what_is_no_model_is_said(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        read_model(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        read_model(tmp_path)
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ValueError, match="neither a directory nor a GGUF file"):
        read_model(tmp_path / "text")
    for content, words in {"{": "cannot be read as JSON", "[]": "no JSON object", "{}": "holds no weights"}.items():
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(ValueError, match=words):
            read_model(tmp_path)
    for data in (b"", b"123", struct.pack("<Q", 9) + b"{", struct.pack("<Q", 2**60), struct.pack("<Q", 2) + b"[]"):
        (tmp_path / "model.safetensors").write_bytes(data)
        with pytest.raises(ValueError, match="no safetensors file"):
            read_model(tmp_path)
