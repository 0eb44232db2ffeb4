"""The benchmark of PTQ runs what the configs say, counts what lives, and projects what it did not get to."""

import inspect
import json
import sys
import weakref
from pathlib import Path

import pytest
import torch
import yaml
from hydra.utils import instantiate
from torch.utils._python_dispatch import TorchDispatchMode

from qat.cli.devices import by_device
from qat.nn.observers.mse import MSE
from qat.surgery.changes import Changes

ROOT = Path(__file__).parents[1]
WEIGHTS = {"llama32_1b": 1235814400, "llama3_8b": 8030261248, "llama3_70b": 70553706496}  # as published


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import bench_ptq

    return bench_ptq


class Live(TorchDispatchMode):
    """The most bytes that tensors took at once, those of `before` aside; not what operators take inside."""

    def __init__(self, before):
        super().__init__()
        self.most, self._now, self._seen = 0, 0, {part.untyped_storage().data_ptr() for part in before}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else (result,):
            if isinstance(part, torch.Tensor):
                storage = part.untyped_storage()
                place, size = storage.data_ptr(), storage.nbytes()
                if size and place not in self._seen:
                    self._seen.add(place)
                    self._now += size
                    weakref.finalize(storage, self._gone, place, size)
                    self.most = max(self.most, self._now)
        return result

    def _gone(self, place, size):
        self._now -= size
        self._seen.discard(place)


def test_recipe_and_knobs_are_those_of_the_configs(script):
    node = yaml.safe_load((ROOT / "configs/recipe/w4a16_g128.yaml").read_text())
    assert instantiate(node, _convert_="all") == script.RECIPE
    for name in ("rtn", "mse_rtn", "gptq", "awq"):
        node, method = yaml.safe_load((ROOT / f"configs/method/{name}.yaml").read_text()), script.METHODS[name]
        assert instantiate(by_device(node["observer"], "cuda")) == method.keywords["observer"]
        defaults = {key: p.default for key, p in inspect.signature(method.func).parameters.items()}
        for key in node.keys() - {"_target_", "_partial_", "observer"}:
            value = node[key]["cuda"] if isinstance(node[key], dict) else node[key]
            assert value == method.keywords.get(key, defaults[key]), (name, key)


@pytest.mark.parametrize("name", WEIGHTS)
def test_shapes_have_as_many_weights_as_is_published(script, name):
    shape = script.SHAPES[name]
    outside = shape.vocab * shape.hidden * (1 if shape.tied else 2) + shape.hidden
    assert outside + shape.layers * (shape.block + 2 * shape.hidden) == WEIGHTS[name]


def test_a_model_is_in_bf16_tied_as_its_shape_says_and_computes(script):
    tied = script.build(script.SHAPES["tiny"], 1, "cpu")
    loose = script.build(script.Shape(256, 512, 1, 4, 2, 128, False), 1, "cpu")
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert not torch.equal(loose.lm_head.weight, loose.model.embed_tokens.weight)
    assert {p.dtype for p in [*tied.parameters(), *loose.parameters()]} == {torch.bfloat16}
    assert (
        sum(p.numel() for p in loose.model.layers.parameters())
        == script.Shape(256, 512, 1, 4, 2, 128, False).block + 512
    )
    logits = loose(input_ids=torch.arange(8)[None]).logits
    assert bool(torch.isfinite(logits).all())
    assert float(logits.std()) > 0


@pytest.mark.parametrize("name", ["gptq_paper", "gptq", "awq", "rtn"])
def test_memory_is_what_lives(script, name):
    """Within a fifth, though codes lie on the same device here; hidden states count, so that two streams differ."""
    shape, samples, length = script.Shape(256, 512, 1, 4, 2, 128, False), 48, 64
    model = script.build(shape, 1, "cpu")
    batches = list(torch.randint(128, (samples, length)).split(4))
    fewer = {"awq": {"grid": 2}, "gptq": {"observer": MSE(points=2)}}.get(name, {})  # candidates, one after another
    with Live(model.parameters()) as live:
        script.METHODS[name](model, script.RECIPE, batches, device="cpu", **fewer)
    assert live.most / 2**30 == pytest.approx(script.peak(shape, name, samples * length, 4 * length), rel=0.2)


def test_of_the_8b_everything_fits_into_24_gib_and_of_the_70b_into_an_80_gb_gpu(script):
    found = {name: [script.peak(script.SHAPES[name], m, 2**18, 2**13) for m in script.METHODS] for name in WEIGHTS}
    assert max(found["llama3_8b"]) < 24
    assert max(found["llama3_70b"]) < 74


def test_what_a_method_did_not_get_to_is_projected(script, monkeypatch):
    """Ten seconds for the first block, two for each that follows: of eight, broken off after three."""
    model, clock, gone = script.build(script.SHAPES["tiny"], 8, "cpu"), [0.0], []
    monkeypatch.setattr(script.time, "monotonic", lambda: clock[0])

    def method(model, recipe, batches, progress, device):
        for block in range(8):
            clock[0] += 2.0 if block else 10.0
            gone.append(block)
            progress(block + 1, 8)
        clock[0] += 5.0  # modules outside of the blocks
        return Changes({"all": None})

    row = script.measure(method, model, [], 13.0, 8, "cpu")
    assert (gone, row["blocks"], row["projected"], row["seconds"]) == ([0, 1, 2], 3, True, 24.0)
    row = script.measure(method, model, [], 100.0, 8, "cpu")
    assert (row["blocks"], row["projected"], row["seconds"]) == (8, False, 29.0)
    row = script.measure(method, model, [], 100.0, 10, "cpu")  # a model of fewer blocks than the shape has
    assert (row["blocks"], row["projected"], row["seconds"]) == (8, True, 33.0)


@pytest.mark.whole
def test_a_run_writes_its_rows_and_prints_the_table_last(script, monkeypatch, tmp_path, capsys):
    file = tmp_path / "found.json"
    sizes = ["--samples", "2", "--seq-len", "16", "--batch-size", "1", "--device", "cpu", "--layers", "1"]
    monkeypatch.setattr(sys, "argv", ["bench_ptq.py", "--json", str(file), "--shape", "tiny", *sizes])
    script.main()
    content = json.loads(file.read_text())
    assert content["meta"].keys() >= {"device", "versions", "commit", "date", "argv"}
    assert [(row["shape"], row["method"]) for row in content["rows"]] == [
        ("tiny", name) for name in ("rtn", "gptq_paper", "gptq", "awq")
    ]
    for row in content["rows"]:
        assert row["seconds"] > 0
        assert (row["blocks"], row["layers"], row["fallbacks"]) == (1, 2, 0)
    assert capsys.readouterr().out.rstrip().endswith(script.table(content["rows"]))


def test_the_readme_says_what_the_file_says(script):
    rows = json.loads((ROOT / "scripts/results/ptq_time.json").read_text(encoding="utf-8"))["rows"]
    marked = f"<!-- from: scripts/results/ptq_time.json -->\n{script.table(rows)}\n\n"
    assert marked in (ROOT / "README.md").read_text(encoding="utf-8")
