"""Foreign loaders agree with ours to the last bit; and where they do not, the tensor is named."""

import copy
from dataclasses import replace

import pytest
import torch
from tiny import tiny
from tiny_export import export
from tiny_grids import RECIPES

from qat.engine.loader import open_checkpoint
from qat.evaluation import foreign, reference
from qat.formats import compressed_tensors, ct_args

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "ct"
    export(path)
    return compressed_tensors.load(path)


@pytest.fixture(scope="module")
def sequences(checkpoint):
    return reference.load(checkpoint.path)


def edited_codes(checkpoint):
    """The same checkpoint as if we decoded one code of one module differently."""
    tensors = dict(checkpoint.tensors)
    codes = tensors[UP].codes.clone()
    codes[3, 5] += 1 if codes[3, 5] < 7 else -1
    tensors[UP] = replace(tensors[UP], codes=codes)
    return replace(checkpoint, tensors=tensors)


def test_the_library_decodes_the_same_weights(checkpoint):
    found = foreign.library(checkpoint)
    assert found["max_abs_diff"] == 0
    assert found["worst"] is None
    assert found["dtype"] == "bfloat16"
    assert "BaseCompressor.decompress" in found["load_path"]


def test_the_library_reads_the_files_own_config_groups(checkpoint):
    """Another width in config.json makes other weights of the same words."""
    config = copy.deepcopy(checkpoint.config)
    for group in config["quantization_config"]["config_groups"].values():
        group["weights"]["num_bits"] = 8
    try:
        found = foreign.library(replace(checkpoint, config=config))
    except (ValueError, RuntimeError):
        return  # the library itself refuses
    assert found["max_abs_diff"] > 0


def test_a_library_that_decodes_one_value_differently_is_caught(checkpoint, monkeypatch):
    compressor = foreign.BaseCompressor.get_value_from_registry(ct_args.PACKED)
    decompress, calls = compressor.decompress, []

    def wrong(parts, scheme):
        out = decompress(parts, scheme)
        calls.append(1)
        if len(calls) == 9:
            out["weight"][2, 3] += 0.5
        return out

    monkeypatch.setattr(compressor, "decompress", wrong)
    found = foreign.library(checkpoint)
    assert found["worst"] == list(checkpoint.tensors)[8]
    assert found["max_abs_diff"] == pytest.approx(0.5, rel=0.02)


def test_transformers_default_load_has_the_same_tensors(checkpoint):
    found = foreign.transformers(checkpoint, None, [])
    assert found["max_abs_diff"] == 0
    assert found["dtype"] == "bfloat16"
    assert found["load_path"] == "AutoModelForCausalLM.from_pretrained"
    assert "max_abs_logit_diff" not in found


def test_transformers_in_fp32_has_the_reference_logits_too(checkpoint, sequences):
    found = foreign.transformers(checkpoint, torch.float32, sequences)
    assert found["max_abs_diff"] == 0
    assert found["dtype"] == "float32"
    assert found["max_abs_logit"] == max(float(s.logits.abs().max()) for s in sequences)
    assert found["max_abs_logit_diff"] <= 1e-4 * found["max_abs_logit"]


def test_an_asymmetric_checkpoint_is_loaded_as_transformers_can(tmp_path):
    export(tmp_path / "ct", symmetric=False)
    checkpoint = compressed_tensors.load(tmp_path / "ct")
    assert foreign.library(checkpoint)["max_abs_diff"] == 0
    found = foreign.transformers(checkpoint, None, [])
    assert found["max_abs_diff"] == 0
    assert found["load_path"].endswith("CompressedTensorsConfig(dequantize=True)")


def test_one_code_that_we_decode_differently_is_named(checkpoint):
    found = foreign.transformers(edited_codes(checkpoint), None, [])
    assert found["worst"] == UP
    assert found["max_abs_diff"] > 0


def test_one_unquantized_value_that_differs_is_named(checkpoint):
    plain = dict(checkpoint.plain)
    plain["model.norm.weight"] = plain["model.norm.weight"].clone()
    plain["model.norm.weight"][7] += 0.25
    found = foreign.transformers(replace(checkpoint, plain=plain), None, [])
    assert found["worst"] == "model.norm.weight"
    assert found["max_abs_diff"] == pytest.approx(0.25, rel=0.02)


def test_one_scale_of_an_input_that_differs_is_named(tmp_path):
    export(tmp_path / "m", rules=RECIPES["w8a8_static"], certified=False)
    checkpoint = compressed_tensors.load(tmp_path / "m")
    name = f"{UP}.input_scale"
    assert foreign.transformers(checkpoint, None, [])["max_abs_diff"] == 0
    edited = replace(checkpoint, plain=dict(checkpoint.plain) | {name: checkpoint.plain[name] * 2})
    assert foreign.transformers(edited, None, [])["worst"] == name


def test_logits_of_another_model_differ(checkpoint, sequences):
    with torch.no_grad():
        found = foreign.logits(tiny(), sequences)
    assert found["max_abs_logit_diff"] > 1e-2 * found["max_abs_logit"]


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (torch.zeros(2), torch.zeros(3)),
        (torch.zeros(2), torch.zeros(2, dtype=torch.bfloat16)),
        (torch.tensor([float("nan")]), torch.tensor([float("nan")])),
    ],
    ids=["shape", "dtype", "nan"],
)
def test_what_cannot_be_compared_is_infinitely_far(a, b):
    assert foreign._difference(a, b) == float("inf")
    assert foreign._difference(torch.ones(2), torch.ones(2)) == 0


@pytest.mark.parametrize("format", ["gguf", "awq"])
def test_one_code_that_is_decoded_differently_in_another_format_is_named(tmp_path, format):
    export(tmp_path / "m", format=format)
    checkpoint = open_checkpoint(tmp_path / "m")
    rows, unchecked = foreign.decoders(checkpoint, [])
    assert unchecked == []
    assert set(rows) <= set(foreign.DECODERS)
    assert {row["max_abs_diff"] for row in rows.values()} == {0}
    for row in foreign.decoders(edited_codes(checkpoint), [])[0].values():
        assert row["worst"] == UP
        assert row["max_abs_diff"] > 0


def test_transformers_reads_every_tensor_of_a_gguf_file(tmp_path):
    export(tmp_path / "m", format="gguf")
    checkpoint, sequences = open_checkpoint(tmp_path / "m"), reference.load(tmp_path / "m")
    found = foreign.transformers_gguf(checkpoint, sequences)
    assert found["max_abs_logit_diff"] < 1e-4 * found["max_abs_logit"]
    plain = dict(checkpoint.plain)
    plain["model.norm.weight"] = plain["model.norm.weight"] + 1
    assert foreign.transformers_gguf(replace(checkpoint, plain=plain), [])["worst"] == "model.norm.weight"
    absent = replace(checkpoint, plain=dict(checkpoint.plain) | {"model.extra.weight": torch.ones(1)})
    found = foreign.transformers_gguf(absent, [])
    assert (found["worst"], found["max_abs_diff"]) == ("model.extra.weight", float("inf"))


def test_no_library_here_decodes_gptq_and_that_is_said(tmp_path):
    export(tmp_path / "m", format="gptq")
    rows, unchecked = foreign.decoders(open_checkpoint(tmp_path / "m"), [])
    assert rows == {}
    assert len(unchecked) == 1
    assert "no library here decodes GPTQ's layout" in unchecked[0]
