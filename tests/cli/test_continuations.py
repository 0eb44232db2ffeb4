import json

import torch
import yaml

from qat.cli.continuations import continuations
from qat.evaluation.reference import decode
from qat.formats import compressed_tensors
from qat.models import hf
from qat.surgery.convert import apply


def test_the_packed_model_continues_as_its_graph_does(finished, root):
    config = yaml.safe_load((finished.path / "config.yaml").read_text())
    config["engine"] |= {"kernel": "reference", "dtype": "float32"}
    path = finished.path / "export" / "compressed_tensors"
    found = continuations(str(path), config)
    model, tokenizer = hf.load("tiny", str(root / "model"))
    checkpoint = compressed_tensors.load(path)
    graph = apply(model, dict(checkpoint.tensors), dict(checkpoint.plain))
    assert list(found) == config["prompts"]
    for prompt, text in found.items():
        sequence = decode(graph, torch.tensor(tokenizer(prompt, add_special_tokens=False)["input_ids"]), 4)
        assert text == tokenizer.decode(sequence.generated)


def test_the_run_keeps_what_was_continued(finished):
    kept = json.loads((finished.path / "summary.json").read_text())["continuations"]
    config = yaml.safe_load((finished.path / "config.yaml").read_text())
    assert kept == continuations(str(finished.path / "export" / "compressed_tensors"), config)
    assert all(f"{prompt!r} -> {text!r}" in finished.out for prompt, text in kept.items())
