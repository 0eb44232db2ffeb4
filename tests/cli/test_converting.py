"""A conversion loses nothing, says where it is from, and refuses what it would have to change."""

import hashlib
import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny
from tiny_export import export

from qat.cli import converting
from qat.cli.converting import check_lossless, convert
from qat.engine.loader import FORMATS, open_checkpoint
from qat.evaluation import reference

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    root = tmp_path_factory.mktemp("sources")
    for name in FORMATS:
        export(root / name, format=name)
    return root


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("compressed_tensors", "gptq"),
        ("compressed_tensors", "awq"),
        ("gptq", "gguf"),
        ("gguf", "awq"),
        ("awq", "compressed_tensors"),
    ],
)
def test_every_format_becomes_another_and_is_verified(sources, tmp_path, source, name):
    certificate = convert(sources / source, name, tmp_path / "out", "cpu")
    assert {k: c["passed"] for k, c in certificate["checks"].items() if not c["passed"]} == {}
    assert certificate["verified"]
    assert certificate["converted_from"]["format"] == FORMATS[source].METHOD
    old, new = open_checkpoint(sources / source), open_checkpoint(tmp_path / "out")
    assert new.config["quantization_config"]["quant_method"] == FORMATS[name].METHOD
    for module, tensor in old.tensors.items():
        assert torch.equal(new.tensors[module].codes, tensor.codes)
        assert torch.equal(new.tensors[module].dequantize(torch.float32), tensor.dequantize(torch.float32))
    assert old.plain.keys() == new.plain.keys()
    assert all(torch.equal(new.plain[key], value) for key, value in old.plain.items())
    for mine, theirs in zip(reference.load(tmp_path / "out"), reference.load(sources / source), strict=True):
        assert torch.equal(mine.logits, theirs.logits)
    assert {"captured": "not applicable: post-training method"}.items() <= certificate.items()
    text = (tmp_path / "out" / "README.md").read_text()
    assert f"Converted from a checkpoint in the format {FORMATS[source].METHOD}, whose" in text
    assert hashlib.sha256((sources / source / "verify.json").read_bytes()).hexdigest() in text
    assert "recipe.yaml" in certificate["files"]
    assert (tmp_path / "out" / "serve" / "vllm.yaml").exists() == (name != "gguf")


def test_there_and_back_is_the_same_file(sources, tmp_path):
    source = sources / "compressed_tensors"
    convert(source, "gptq", tmp_path / "there", "cpu")
    convert(tmp_path / "there", "compressed_tensors", tmp_path / "back", "cpu")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes(), name
    assert json.loads((tmp_path / "back" / "verify.json").read_text())["converted_from"]["format"] == "gptq"


def test_zero_points_survive(tmp_path):
    export(tmp_path / "ct", 4, symmetric=False)
    for name in ("gptq", "awq"):
        assert convert(tmp_path / "ct", name, tmp_path / name, "cpu")["verified"]
        for module, tensor in open_checkpoint(tmp_path / "ct").tensors.items():
            assert torch.equal(open_checkpoint(tmp_path / name).tensors[module].zero_point, tensor.zero_point)


def test_a_g_idx_survives_where_the_format_carries_it(tmp_path):
    export(tmp_path / "ct", 4, symmetric=False, scatter=True)
    assert convert(tmp_path / "ct", "gptq", tmp_path / "gptq", "cpu")["verified"]
    assert convert(tmp_path / "gptq", "compressed_tensors", tmp_path / "back", "cpu")["verified"]
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "ct" / name).read_bytes(), name
    for module, tensor in open_checkpoint(tmp_path / "ct").tensors.items():
        assert torch.equal(open_checkpoint(tmp_path / "gptq").tensors[module].g_idx, tensor.g_idx)
    for name in ("awq", "gguf"):
        with pytest.raises(ValueError, match=rf"^model\.\S+: .* g_idx, which {name} cannot carry\. Use format=gptq"):
            convert(tmp_path / "ct", name, tmp_path / "out", "cpu")
    with pytest.raises(ValueError, match=r"^model\.\S+ .*: export\.target=transformers decodes with .* no g_idx since"):
        convert(tmp_path / "gptq", "compressed_tensors", tmp_path / "out", "cpu", "transformers")
    assert not (tmp_path / "out").exists()


def test_without_a_certificate_it_says_what_cannot_be_verified(tmp_path):
    export(tmp_path / "ct", certified=False)
    (tmp_path / "ct" / "verify.json").unlink()
    certificate = convert(tmp_path / "ct", "gptq", tmp_path / "out", "cpu")
    assert not certificate["verified"]
    assert certificate["checks"]["tensors"]["passed"]
    said = " ".join(certificate["unchecked"])
    assert "no reference lies beside the checkpoint" in said
    assert "converted from had no certificate" in said
    assert certificate["captured"] == converting.UNKNOWN


def test_what_a_format_cannot_say_is_refused_by_module_and_nothing_is_written(tmp_path):
    export(tmp_path / "ct", 3)
    with pytest.raises(ValueError, match=r"^model\.layers\.0\.\S+: awq carries integers of 4 bits; int3_g32"):
        convert(tmp_path / "ct", "awq", tmp_path / "out", "cpu")
    export(tmp_path / "kv", kv="int8")
    with pytest.raises(ValueError, match=r"^recipe\.kv: gptq has no word"):
        convert(tmp_path / "kv", "gptq", tmp_path / "out", "cpu")
    assert not (tmp_path / "out").exists()


def test_what_the_target_cannot_load_is_refused_and_nothing_is_written(tmp_path):
    export(tmp_path / "ct", 4)
    with pytest.raises(ValueError, match=r"^format\.name: export\.target=vllm does not read format=gguf"):
        convert(tmp_path / "ct", "gguf", tmp_path / "out", "cpu", "vllm")
    with pytest.raises(
        ValueError, match=r"^model\.layers\.0\.\S+ \[64, 64\] as int4_g32_signed: export\.target=sglang"
    ):
        convert(tmp_path / "ct", "gptq", tmp_path / "out", "cpu", "sglang")
    assert not (tmp_path / "out").exists()


def test_a_source_that_is_not_what_its_certificate_says_is_refused(sources, tmp_path):
    path = shutil.copytree(sources / "compressed_tensors", tmp_path / "ct")
    tensors = load_file(path / "model.safetensors")
    tensors["model.norm.weight"].view(torch.int16)[3] ^= 1
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.norm\.weight is not what verify\.json certifies"):
        convert(path, "gptq", tmp_path / "out", "cpu")
    del tensors["model.norm.weight"]
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"model\.norm\.weight is missing, of which verify\.json speaks"):
        convert(path, "gptq", tmp_path / "out", "cpu")
    (path / "verify.json").unlink()
    shutil.rmtree(path / "verify")
    with pytest.raises(ValueError, match=r"tensor model\.norm\.weight is missing"):
        convert(path, "gptq", tmp_path / "out", "cpu")


def test_a_reference_that_was_changed_is_refused(sources, tmp_path):
    path = shutil.copytree(sources / "gptq", tmp_path / "m")
    sequences = reference.load(path)
    sequences[0].logits[0, 0] += 1
    reference.save(path, sequences)
    with pytest.raises(ValueError, match=r"not the reference that verify\.json certifies"):
        convert(path, "awq", tmp_path / "out", "cpu")


def test_a_directory_is_not_converted_onto_itself_and_a_plain_one_not_at_all(sources, tmp_path):
    with pytest.raises(ValueError, match="the checkpoint that is read; name another directory"):
        convert(sources / "gptq", "awq", sources / "gptq", "cpu")
    tiny().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="nothing in it is quantized"):
        convert(tmp_path / "plain", "awq", tmp_path / "out", "cpu")


@pytest.mark.parametrize("part", ["codes", "scale", "scheme"])
def test_the_first_module_that_was_written_otherwise_is_named(sources, part):
    """Read back and compared one by one: a writer that loses one bit cannot pass."""
    tensors = dict(open_checkpoint(sources / "gptq").tensors)
    own = dict(tensors)
    if part == "codes":
        own[UP] = replace(own[UP], codes=own[UP].codes.clone().index_fill_(0, torch.tensor([3]), 2))
    elif part == "scale":
        own[UP] = replace(own[UP], scale=own[UP].scale * 2)
    else:  # the parts are there, and mean another weight
        tensors[UP] = replace(tensors[UP], scale=tensors[UP].scale * 2)
    named = "decodes to another weight" if part == "scheme" else rf"{UP}\.{part} does not survive"
    with pytest.raises(ValueError, match=named):
        check_lossless(sources / "gptq", tensors, own)
    with pytest.raises(ValueError, match="extra was not written as a quantized module"):
        check_lossless(sources / "gptq", {"extra": tensors[UP]}, own)


def test_reading_back_is_no_formality(sources, tmp_path, monkeypatch):
    """A `save` that writes one code otherwise is found before a certificate is issued."""
    save = FORMATS["gptq"].save

    def wrong(path, model, recipe, tensors, *rest):
        codes = tensors[UP].codes.clone()
        codes[5, 7] = -codes[5, 7] - 1
        save(path, model, recipe, dict(tensors) | {UP: replace(tensors[UP], codes=codes)}, *rest)

    monkeypatch.setattr(FORMATS["gptq"], "save", wrong)
    with pytest.raises(ValueError, match=rf"{UP}\.codes does not survive the conversion"):
        convert(sources / "compressed_tensors", "gptq", tmp_path / "out", "cpu")
    assert json.loads((tmp_path / "out" / "verify.json").read_text()) == {"verified": False}
