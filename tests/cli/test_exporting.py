import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import byte_tokenizer

from qat.cli.exporting import FORMATS, check_tokenizer, export, outcome, references
from qat.cli.main import main
from qat.evaluation.foreign import DECODERS
from qat.formats import compressed_tensors
from qat.nn.observers.minmax import MinMax
from qat.ptq.rtn import rtn
from qat.surgery.convert import apply

CHECKS = {
    "tensors": {"passed": True},
    "compressed_tensors": {"passed": True},
    "transformers_default": {"passed": True},
    "engine": {"max_abs_logit_diff": 1e-6, "max_kl": 1e-9, "greedy_equal": 3, "prompts": 3, "passed": True},
    "fast_path": {"kl": 1e-5},
}


def test_a_certificate_in_the_words_of_the_summary():
    assert outcome("somewhere", {"verified": True, "checks": CHECKS}) == {
        "path": "somewhere",
        "verified": True,
        "codes_equal": True,
        "files_changed": [],
        "weights_equal": True,
        "max_abs_logit_diff": 1e-6,
        "max_kl": 1e-9,
        "greedy_equal": True,
        "fast_path": {"kl": 1e-5},
    }


def test_a_file_that_was_changed_or_added_is_named():
    files = {"equal": 3, "changed": ["config.json"], "added": ["extra.safetensors"], "passed": False}
    found = outcome("x", {"verified": False, "checks": CHECKS | {"files": files}})
    assert found["files_changed"] == ["config.json", "extra.safetensors"]


@pytest.mark.parametrize("name", ["compressed_tensors", "transformers_default"])
def test_one_loader_that_disagrees_is_enough(name):
    checks = CHECKS | {name: {"passed": False}}
    assert not outcome("x", {"verified": False, "checks": checks})["weights_equal"]


@pytest.mark.parametrize("what", ["tokenizer", "chat_template", "eos_token_id"])
def test_a_tokenizer_that_was_written_as_another_is_found(tmp_path, what):
    """The certificate's prompts are ids: it would serve other text and be verified."""
    own = byte_tokenizer()
    own.save_pretrained(tmp_path)
    check_tokenizer(tmp_path, own)
    if what == "tokenizer":
        content = json.loads((tmp_path / "tokenizer.json").read_text())
        words = content["model"]["vocab"]
        words["a"], words["b"] = words["b"], words["a"]
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    elif what == "chat_template":
        (tmp_path / "chat_template.jinja").write_text("something else")
    else:
        own.eos_token = "a"
    with pytest.raises(AssertionError, match=f"another {what} was written"):
        check_tokenizer(tmp_path, own)


def test_one_prompt_that_goes_elsewhere_is_enough():
    checks = CHECKS | {"engine": CHECKS["engine"] | {"greedy_equal": 2}}
    assert outcome("x", {"verified": False, "checks": checks})["greedy_equal"] is False


def test_what_was_not_checked_is_none_and_not_equal():
    loaders = {name: CHECKS[name] for name in ("compressed_tensors", "transformers_default")}
    found = outcome("x", {"verified": False, "checks": loaders})
    unknown = ("codes_equal", "max_abs_logit_diff", "max_kl", "greedy_equal", "fast_path")
    assert [found[key] for key in unknown] == [None] * 5
    assert not found["verified"]


def test_weights_that_nobody_decoded_are_not_equal_weights():
    """GPTQ's layout has no loader here: the summary may not say that loaders agree."""
    own = {name: CHECKS[name] for name in ("tensors", "engine", "fast_path")}
    assert outcome("x", {"verified": True, "checks": own})["weights_equal"] is None
    for name in DECODERS:
        assert outcome("x", {"verified": True, "checks": own | {name: {"passed": True}}})["weights_equal"] is True
        assert outcome("x", {"verified": True, "checks": own | {name: {"passed": False}}})["weights_equal"] is False


def test_every_format_option_is_a_format(capsys):
    assert main(["configs", "ls", "format"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in FORMATS)


@pytest.mark.parametrize(
    ("stored", "named"),
    [
        ("model.norm.weight", "model.norm.weight"),
        ("model.embed_tokens.weight", "model.embed_tokens.weight"),
        ("model.layers.0.mlp.up_proj.weight_packed", "model.layers.0.mlp.up_proj.codes"),
        ("model.layers.0.mlp.up_proj.weight_scale", "model.layers.0.mlp.up_proj.scale"),
    ],
)
def test_a_file_that_is_not_what_it_was_made_from_is_refused(bench, monkeypatch, stored, named):
    """Digests are taken before the file: a `save` that writes one bit otherwise cannot certify itself."""
    changes = rtn(bench.model, bench.recipe, [], observer=MinMax())
    sequences = references(bench, apply(bench.model, changes.tensors, changes.folded))
    save = compressed_tensors.save

    def wrong(path, *args):
        save(path, *args)
        tensors = load_file(path / "model.safetensors")
        tensors[stored].view({2: torch.int16, 4: torch.int32}[tensors[stored].element_size()]).view(-1)[0] ^= 1
        save_file(tensors, path / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(compressed_tensors, "save", wrong)
    with pytest.raises(ValueError, match=rf"{named} is not what verify\.json certifies"):
        export(bench, "rtn", changes.tensors, changes.folded, sequences, "not applicable: post-training method")
