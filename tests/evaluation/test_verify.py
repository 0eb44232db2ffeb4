"""The certificate holds where it should, and one changed bit anywhere breaks it."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_export import export

from qat.evaluation.verify import verify

Q = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "ct"
    export(path)
    return path


@pytest.fixture
def copy(exported, tmp_path):
    return shutil.copytree(exported, tmp_path / "ct")


def edit(path, change):
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def flip(name, mask=1):
    def change(tensors):
        value = tensors[name].view({2: torch.int16, 4: torch.int32}[tensors[name].element_size()]).flatten()
        value[3] ^= mask

    return change


@pytest.mark.parametrize(("bits", "symmetric"), [(4, True), (3, True), (4, False), (8, True), (2, False)])
def test_a_true_export_is_verified(tmp_path, bits, symmetric):
    export(tmp_path / "ct", bits, symmetric)
    certificate = verify(tmp_path / "ct")
    assert {k: c["passed"] for k, c in certificate["checks"].items() if not c["passed"]} == {}
    assert certificate["verified"]
    assert certificate["checks"]["engine"]["greedy_equal"] == 3
    assert ("transformers_fp32" in certificate["checks"]) == symmetric
    assert json.loads((tmp_path / "ct" / "verify.json").read_text())["verified"]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (flip(f"{Q}.weight_packed"), f"{Q}.codes"),
        (flip(f"{Q}.weight_scale"), f"{Q}.scale"),
        (flip("model.norm.weight"), "model.norm.weight"),
        (flip("model.embed_tokens.weight"), "model.embed_tokens.weight"),
    ],
)
def test_one_flipped_bit_is_found_and_named(copy, change, named):
    edit(copy, change)
    with pytest.raises(ValueError, match=rf"model\.safetensors: {named} is not what verify.json certifies"):
        verify(copy)


def test_a_wrong_reference_is_found(copy):
    reference = copy / "verify" / "reference.safetensors"
    parts = load_file(reference)
    parts["0.logits"][0, 0] += 1
    save_file(parts, reference)
    with pytest.raises(ValueError, match="not the reference that"):
        verify(copy)


def test_a_missing_tensor_is_found(copy):
    certificate = json.loads((copy / "verify.json").read_text())
    certificate["sha256"]["model.extra.weight"] = "0"
    (copy / "verify.json").write_text(json.dumps(certificate))
    assert not verify(copy)["verified"]
    assert verify(copy)["checks"]["tensors"]["missing"] == ["model.extra.weight"]


@pytest.mark.parametrize("what", ["codes", "norm"])
def test_an_export_of_other_weights_fails_though_its_own_digests_agree(tmp_path, monkeypatch, what):
    """Digests made from the file would agree with it. The reference logits come from before the file."""
    from qat.evaluation import verify as module

    issue = module.issue

    def forged(path, tensors, unquantized, sequences, facts):
        edit(path, flip(f"{Q}.weight_packed", 7) if what == "codes" else flip("model.norm.weight", 64))
        from qat.formats import compressed_tensors

        checkpoint = compressed_tensors.load(path)
        issue(path, dict(checkpoint.tensors), dict(checkpoint.plain), sequences, facts)

    monkeypatch.setattr("tiny_export.issue", forged)
    export(tmp_path / "ct")
    certificate = verify(tmp_path / "ct")
    assert not certificate["verified"]
    assert not certificate["checks"]["engine"]["passed"]
    assert certificate["checks"]["tensors"]["passed"]


def test_greedy_tokens_must_be_equal(copy):
    """A reference whose generated tokens are others, with digests that agree, is not reproduced."""
    from qat.evaluation import reference
    from qat.evaluation.verify import _reference_digests

    sequences = reference.load(copy)
    sequences[1].ids[10] = (sequences[1].ids[10] + 1) % 256
    reference.save(copy, sequences)
    certificate = json.loads((copy / "verify.json").read_text())
    (copy / "verify.json").write_text(json.dumps(certificate | {"reference": _reference_digests(sequences)}))
    certificate = verify(copy)
    assert not certificate["verified"]
    assert certificate["checks"]["engine"]["greedy_equal"] == 2


def test_a_bare_checkpoint_says_what_could_not_be_checked(tmp_path):
    export(tmp_path / "ct", certified=False)
    certificate = verify(tmp_path / "ct")
    assert not certificate["verified"]
    assert len(certificate["unchecked"]) == 3
    assert certificate["checks"]["compressed_tensors"]["passed"]
    assert not (tmp_path / "ct" / "verify.json").exists()


def test_captured_weights_must_all_be_equal(copy):
    certificate = json.loads((copy / "verify.json").read_text())
    for captured, passed in (
        ({"modules": 14, "equal": 14, "dtype": "float32"}, True),
        ({"modules": 14, "equal": 13}, False),
    ):
        (copy / "verify.json").write_text(json.dumps(certificate | {"captured": captured}))
        assert verify(copy)["verified"] is passed


def test_too_few_prompts_prove_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("tiny_export.PROMPTS", ([5, 9],))
    export(tmp_path / "ct")
    assert not verify(tmp_path / "ct")["verified"]
