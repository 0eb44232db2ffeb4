"""What cannot be served is refused at load, by the name of the tensor and the file, or of the key."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_export import export

from qat.engine.config import EngineConfig
from qat.engine.loader import HEADS, SIZES, Loaded, bytes_of, cache_kind, load
from qat.numerics.recipe import Recipe

REFERENCE = EngineConfig(device="cpu", kernel="reference")


@pytest.fixture
def copied(saved: Callable, tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint to be damaged."""

    def copy(family: str, scheme: str | None = None) -> Path:
        return Path(shutil.copytree(saved(family, scheme).path, tmp_path / "checkpoint"))

    return copy


def edit_config(path: Path, **changes: Any) -> None:
    file = path / "config.json"
    config = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in config.items() if v != "DELETE"}))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})


def refused(path: Path, *words: str, config: EngineConfig = REFERENCE) -> None:
    with pytest.raises(ValueError, match=re.escape(words[0])) as caught:
        load(path, config)
    for word in words:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


Q0 = "model.layers.0.self_attn.q_proj"
NORM = "model.norm.weight"


@pytest.mark.parametrize("name", [NORM, "model.embed_tokens.weight", f"{Q0}.weight", f"{Q0}.bias"])
def test_missing_tensors(copied: Callable, name: str) -> None:
    path = copied("qwen2")
    edit_tensors(path, lambda tensors: tensors.pop(name))
    refused(path, name, str(path), "missing")


@pytest.mark.parametrize("part", ["weight_packed", "weight_scale", "weight_shape"])
def test_missing_parts_of_packed_tensors(copied: Callable, part: str) -> None:
    path = copied("llama", "w4_g32")
    edit_tensors(path, lambda tensors: tensors.pop(f"{Q0}.{part}"))
    refused(path, Q0, str(path))


def test_tensors_that_have_no_place(copied: Callable) -> None:
    path = copied("llama", "w4_g32")
    edit_tensors(path, lambda tensors: tensors.update({"model.layers.7.mlp.up_proj.weight": torch.zeros(2, 2)}))
    refused(path, "model.layers.7.mlp.up_proj.weight", "model.safetensors", "no place")


def test_frequencies_of_old_checkpoints_are_no_surprise(copied: Callable) -> None:
    path = copied("llama")
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    edit_tensors(path, lambda tensors: tensors.update(extra))
    load(path, REFERENCE)


@pytest.mark.parametrize("name", [NORM, f"{Q0}.weight", "model.embed_tokens.weight"])
def test_shapes_that_contradict_the_config(copied: Callable, name: str) -> None:
    path = copied("llama")
    edit_tensors(path, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    refused(path, name, "model.safetensors", "config.json asks for")


def test_packed_shapes_that_contradict_the_config(copied: Callable) -> None:
    path = copied("llama", "w4_g32")
    edit_config(path, intermediate_size=128)
    refused(path, "model.layers.0.mlp", "model.safetensors", "config.json asks for")


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_values_that_are_not_finite(copied: Callable, poison: float) -> None:
    path = copied("llama")
    edit_tensors(path, lambda tensors: tensors[NORM].__setitem__(3, poison))
    refused(path, NORM, "model.safetensors", "NaN")


@pytest.mark.parametrize("scale", [0.0, -0.0, torch.nan, torch.inf])  # a negative one is a weight's, by one convention
def test_scales_that_are_none(copied: Callable, scale: float) -> None:
    path = copied("llama", "w4_g32")
    edit_tensors(path, lambda tensors: tensors[f"{Q0}.weight_scale"].view(-1).__setitem__(0, scale))
    refused(path, f"{Q0}.weight_scale", "model.safetensors")


def test_integers_where_floats_belong(copied: Callable) -> None:
    path = copied("llama")
    edit_tensors(path, lambda tensors: tensors.update({NORM: torch.ones(64, dtype=torch.int32)}))
    refused(path, NORM, "int32")


@pytest.mark.parametrize("scheme", [None, "w4_g32"])
def test_truncated_files(copied: Callable, scheme: str | None) -> None:
    path = copied("llama", scheme)
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    refused(path, "model.safetensors")


def test_certified_tensors_that_were_changed(copied: Callable) -> None:
    path = copied("llama", "w4_g32")
    (path / "verify.json").write_text(json.dumps({"sha256": {NORM: "0" * 64}}))
    refused(path, "model.safetensors", "certifies")


def test_an_untied_head_under_a_tied_config(copied: Callable) -> None:
    path = copied("llama")
    embedding = load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    edit_tensors(path, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    load(path, REFERENCE)
    edit_tensors(path, lambda tensors: tensors["lm_head.weight"].add_(1))
    refused(path, "lm_head.weight", "model.safetensors", "ties")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, ["GPT2LMHeadModel", "LlamaForCausalLM"]),
        ({"architectures": None}, ["not served"]),
        ({"hidden_act": "gelu"}, ["hidden_act 'gelu'"]),
        ({"model_type": "unheard_of"}, ["config.json"]),
        ({"num_hidden_layers": "two"}, ["config.json"]),
        ({"num_attention_heads": 3}, ["config.json"]),
        ({"num_key_value_heads": 3}, ["3 key-value heads"]),
        *(({key: 0}, ["config.json", key]) for key in (*SIZES, *HEADS) if key != "num_attention_heads"),
        *(({key: -1}, ["config.json"]) for key in (*SIZES, *HEADS)),
        ({"num_attention_heads": 0}, ["config.json"]),  # transformers itself divides by it
        ({"max_position_embeddings": None}, ["config.json"]),
        ({"head_dim": True}, ["config.json"]),
        ({"dtype": "blorp"}, ["config.json", "blorp"]),
        ({"dtype": ["bfloat16"]}, ["config.json"]),
        ({"dtype": 3}, ["config.json", "dtype 3"]),
        ({"dtype": "int8"}, ["config.json", "dtype torch.int8"]),
        ({"eos_token_id": "</s>"}, ["config.json"]),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, ["rope_type 'dynamic'"]),
        ({"quantization_config": {"quant_method": "fbgemm_fp8"}}, ["'fbgemm_fp8'", "compressed-tensors, gptq, awq"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["no tensor ends in qweight"]),
        ({"num_hidden_layers": 1}, ["model.layers.1", "no place"]),
        ({"vocab_size": 300}, ["model.embed_tokens.weight", "(300, 64)"]),
    ],
    ids=str,
)
def test_configs_that_are_not_served(copied: Callable, changes: dict[str, Any], words: list[str]) -> None:
    path = copied("llama")
    edit_config(path, **changes)
    refused(path, *words)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 0},
        {"num_key_value_heads": 0},
        {"dtype": "blorp"},
        {"dtype": 3},
        {"max_position_embeddings": 0},
    ],
    ids=str,
)
def test_packed_checkpoints_with_such_configs_are_refused_too(copied: Callable, changes: dict[str, Any]) -> None:
    path = copied("llama", "w4_g32")
    edit_config(path, **changes)
    refused(path, "config.json")


def test_sliding_windows_are_served_up_to_their_length(copied: Callable) -> None:
    path = copied("mistral")
    edit_config(path, sliding_window=50)
    refused(path, "sliding_window=50", "max_model_len=50")
    assert load(path, EngineConfig(device="cpu", max_model_len=50)).max_model_len == 50


def test_sliding_layers_of_qwen(copied: Callable) -> None:
    path = copied("qwen3")
    edit_config(path, use_sliding_window=True, sliding_window=50, max_window_layers=1, layer_types="DELETE")
    refused(path, "sliding_window=50")
    edit_config(path, max_window_layers=2)  # no layer slides
    assert load(path, REFERENCE).max_model_len == 128


def test_lengths_beyond_the_model(copied: Callable) -> None:
    refused(copied("llama"), "max_model_len=129", "128", config=EngineConfig(device="cpu", max_model_len=129))


def test_directories_without_a_checkpoint(tmp_path: Path) -> None:
    refused(tmp_path, "config.json")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, "config.json", "list")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_device_that_is_not_there(copied: Callable) -> None:
    refused(copied("llama"), "device='cuda'", config=EngineConfig(device="cuda"))


@pytest.mark.parametrize("scheme", ["w4_g32", "w3_g32", "w8_channel_asym"])
@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_packed_weights_stay_packed(saved: Callable, scheme: str, kernel: str) -> None:
    loaded: Loaded = load(saved("llama", scheme).path, EngineConfig(device="cpu", kernel=kernel))
    assert loaded.weight_bytes == bytes_of(loaded.model)
    assert loaded.weight_bytes <= 1.1 * loaded.file_bytes
    assert loaded.model.head.weight is loaded.model.embedding.weight  # tied: once
    assert loaded.model.embedding.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("kernel", ["auto", "reference"])
def test_a_packed_table_is_in_memory_once_and_never_in_floating_point(saved: Callable, kernel: str) -> None:
    checkpoint = saved("llama", "w4_embed8")
    loaded: Loaded = load(checkpoint.path, EngineConfig(device="cpu", kernel=kernel))
    assert loaded.weight_bytes == bytes_of(loaded.model) <= 1.1 * loaded.file_bytes
    assert loaded.model.head is loaded.model.embedding.linear
    table = loaded.model.embedding.linear.weight
    assert table.nbytes == 256 * 64 + 256 * 2
    assert all(parameter.dim() == 1 for parameter in loaded.model.parameters())


def test_a_plain_head_beside_a_packed_embedding_that_it_is_tied_to(copied: Callable) -> None:
    path = copied("llama", "w4_embed8")
    edit_tensors(path, lambda tensors: tensors.update({"lm_head.weight": torch.zeros(256, 64).bfloat16()}))
    refused(path, "lm_head.weight has no place")


def test_plain_weights_keep_their_storage_dtype(saved: Callable, copied: Callable) -> None:
    assert load(saved("llama").path, REFERENCE).model.embedding.weight.dtype == torch.float32
    path = copied("qwen2")
    edit_tensors(path, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}))
    model = load(path, REFERENCE).model
    assert model.head.weight.dtype == model.layers[0].mlp.down.weight.dtype == torch.bfloat16
    assert model.dtype == torch.float32


def test_the_cache_is_the_checkpoints_unless_another_is_asked_for(saved: Callable, tmp_path: Path) -> None:
    export(tmp_path / "ct", kv="int4", certified=False)
    for asked, kind in (("auto", "int4"), ("none", None), ("fp8", "fp8")):
        assert load(tmp_path / "ct", EngineConfig(device="cpu", kv=asked)).kv == kind
    path = saved("llama").path
    assert [load(path, EngineConfig(device="cpu", kv=asked)).kv for asked in ("auto", "int8")] == [None, "int8"]


def test_heads_that_do_not_fit_the_cache() -> None:
    with pytest.raises(ValueError, match=r"recipe\.kv: int4 .*head_dim=15 is odd"):
        cache_kind(EngineConfig(kv="int4"), Recipe({}), 15)
    assert cache_kind(EngineConfig(kv="int8"), Recipe({}), 15) == "int8"
