"""Ours against peers: what is judged is what a tool left, on the grid it claims; differences are those of windows."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny

from qat.evaluation.divergence import evaluate
from qat.nn.observers.minmax import MinMax
from qat.numerics.granularity import PerGroup
from qat.numerics.grid import IntGrid
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme
from qat.ptq.rtn import rtn
from qat.surgery.convert import apply

ROOT = Path(__file__).parents[1]
IDS = torch.arange(1, 25).reshape(3, 8)


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "reproduce"))


@pytest.fixture
def model():
    return tiny(layers=2)


def rounded(model, bits):
    """What a driver leaves: every parameter, dequantized."""
    recipe = Recipe({"linears": Rule(".*_proj", Scheme(IntGrid(bits), PerGroup(64)))})
    graph = apply(model, rtn(model, recipe, [], observer=MinMax(), dtype=torch.float32).tensors, {})
    return {name: value.detach().clone() for name, value in graph.named_parameters()}, graph


def left(path, dense, **row):
    """A driver's file."""
    took = {"seconds": 2.0, "cpu_seconds": 1.0, "peak_mem_mb": 3.0, "scale_dtype": "float32", "settings": "none"}
    save_file(dense, path, {"row": json.dumps(took | row)})
    return path


def test_what_is_judged_is_what_the_tool_left(model, tmp_path):
    import ptq_peers

    dense, graph = rounded(model, 3)
    full = ptq_peers.Remembered(model)
    reference = {"tool": "-", "method": "fp", "recipe": "-"} | ptq_peers.judged(model, IDS, full)
    cell = ptq_peers.Cell("llmcompressor", "rtn", 3)
    row = ptq_peers.row_of(cell, left(tmp_path / "x.safetensors", dense), full, IDS, reference)
    scores = evaluate(graph, IDS, model)
    assert (row["tool"], row["method"], row["recipe"], row["seconds"]) == ("llmcompressor", "rtn", "w3a16_g64", 2.0)
    assert row["kl"] == pytest.approx(float(scores.kl.sum() / 21), rel=1e-12)
    assert row["ppl"] == pytest.approx(float((scores.nll.sum() / 21).exp()), rel=1e-12)
    own = evaluate(model, IDS).nll
    assert row["nll_se"] == pytest.approx(float(((scores.nll - own) / 7).std() / 3**0.5), rel=1e-3)
    assert reference["kl"] == 0
    assert len(full.known) == 3, "the full-precision model computed every window once, for both rows"


def test_a_tool_is_held_to_its_task(model):
    import ptq_peers

    dense, _ = rounded(model, 3)
    ptq_peers.check(model, dense, 3)
    ptq_peers.check(model, dense | {"lm_head.weight": dense["model.embed_tokens.weight"]}, 3)
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(ValueError, match=r"_proj.weight: a group of 64 has \d values, 2 bits hold 4"):
        ptq_peers.check(model, dense, 2)
    with pytest.raises(ValueError, match=rf"{name}: a group of 64 has \d+ values"):
        ptq_peers.check(model, dense | {name: model.get_parameter(name).detach()}, 3)
    with pytest.raises(ValueError, match=rf"{name}: not there"):
        ptq_peers.check(model, {key: value for key, value in dense.items() if key != name}, 3)
    with pytest.raises(ValueError, match=r"^model.norm.weight: not there"):
        ptq_peers.check(model, {key: value for key, value in dense.items() if key != "model.norm.weight"}, 3)
    with pytest.raises(ValueError, match=rf"^{name}: not finite"):
        ptq_peers.check(model, dense | {name: dense[name] * torch.nan}, 3)
    with pytest.raises(ValueError, match=rf"{name}: \(1, 64\), expected"):
        ptq_peers.check(model, dense | {name: dense[name][:1]}, 3)
    with pytest.raises(ValueError, match="no such parameter"):
        ptq_peers.check(model, dense | {"model.scale": dense[name]}, 3)
    for outside in ("model.embed_tokens.weight", "lm_head.weight"):
        with pytest.raises(ValueError, match=f"{outside}: changed"):
            ptq_peers.check(model, dense | {outside: dense["model.embed_tokens.weight"] * 1.5}, 3)


def a_row(tool, method, nll, kl):
    tokens = 10 * len(nll)
    return {"tool": tool, "method": method, "recipe": "w4a16_g64", "ppl": 1.0, "nll": sum(nll) / tokens, "kl": 0.0,
            "seconds": 1.0, "cpu_seconds": 1.0, "peak_mem_mb": 1.0, "tokens": tokens,
            "windows": {"nll": nll, "kl": kl}}  # fmt: skip


def test_differences_are_paired_window_by_window():
    import ptq_peers

    ours, paper = (
        a_row("qat", "gptq", [10.0, 20.0, 60.0], [1.0, 1.0, 1.0]),
        a_row("qat", "gptq_paper", [0.0] * 3, [3.0] * 3),
    )
    theirs = a_row("llmcompressor", "gptq", [11.0, 22.0, 63.0], [1.0, 1.0, 1.0])
    found = ptq_peers.pairs([ours, paper, theirs, a_row("gptqmodel", "gptq", [1.0, 2.0, 3.0], [0.0] * 3)])
    assert [(one["tool"], one["ours"]) for one in found] == [
        (tool, ours) for tool in ("gptqmodel", "llmcompressor") for ours in ("gptq_paper", "gptq")
    ]
    one = found[3]
    assert one["nll_difference"] == pytest.approx(-0.2)  # -1, -2, -3 over ten tokens each
    assert one["nll_errors"] == pytest.approx(-0.2 / (0.1 / 3**0.5))
    assert (one["kl_difference"], one["kl_errors"]) == (0.0, None)
    (text,) = ptq_peers.pairs_tables(found)
    assert "| -0.2000 | -3.5 | +0.0000 | — |" in text
    alike = ptq_peers.pairs([ours, theirs, a_row("qat", "gptq_ct", [12.0, 22.0, 64.0], [2.0] * 3)])
    texts = ptq_peers.pairs_tables(alike)
    assert [("-0.2000" in text, "`gptq_ct`" in text) for text in texts] == [(True, False), (False, True)]


def test_methods_pair_with_methods_of_ours():
    import ptq_peers

    for tool, methods in ptq_peers.TOOLS.items():
        for method in methods if tool != "qat" else ():
            assert set(ptq_peers.OURS[method]) <= set(ptq_peers.TOOLS["qat"])
    asked = ptq_peers.cells(["qat", "gptqmodel"], ["gptq"], [4, 2])
    assert [str(cell) for cell in asked] == [f"{t}.gptq.w{b}a16_g64" for b in (4, 2) for t in ("qat", "gptqmodel")]


def test_ours_is_what_the_configs_say(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "reproduce" / "peers"))
    import ptq_peers
    import run_qat

    assert sorted(ptq_peers.TOOLS["qat"]) == sorted(run_qat.METHODS)
    node = {m: run_qat.composed(run_qat.overrides(m, 3, 16, 8, 16))["method"] for m in run_qat.METHODS}
    assert node["gptq"]["observer"]["points"] == 80
    assert (node["gptq"]["asymmetry"], node["gptq_paper"]["asymmetry"]) == (0.25, 0)
    assert node["gptq_paper"]["observer"]["_target_"].endswith("MinMax")
    assert {node[name]["act_order"] for name in ("gptq", "gptq_paper")} == {"static"}
    for method in ("rtn", "gptq_paper", "gptq", "awq"):
        pair = [run_qat.composed(run_qat.overrides(m, 3, 16, 8, 16)) for m in (method, f"{method}_ct")]
        assert pair[0]["method"] == pair[1]["method"]
        weights = [config["recipe"]["rules"]["linears"]["weight"] for config in pair]
        assert [weight["convention"] for weight in weights] == ["signed", "ct"]
    assert node["autoround"]["epochs"] * 16 == 16 * 8
    with pytest.raises(ValueError, match="no whole passes over 16 samples"):
        run_qat.overrides("autoround", 4, 3, 8, 16)


def test_a_driver_that_fails_is_said_and_what_is_made_is_not_made_again(tmp_path):
    import ptq_peers

    given = Namespace(work=tmp_path, venvs=tmp_path, threads=1, steps=1, batch_size=2, device="cpu")
    given.samples, given.seq_len = 3, 4
    cell = ptq_peers.Cell("gptqmodel", "gptq", 4)
    with pytest.raises(RuntimeError, match=r"gptqmodel\.gptq\.w4a16_g64: no environment"):
        ptq_peers.make(cell, given, tmp_path, tmp_path)
    python = tmp_path / "gptqmodel" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho the reason >&2\nexit 3\n")
    python.chmod(0o755)
    with pytest.raises(RuntimeError, match=r"ended with 3:\nthe reason"):
        ptq_peers.make(cell, given, tmp_path, tmp_path)
    (tmp_path / f"{cell}.3x4.1x2.safetensors").touch()
    assert ptq_peers.make(cell, given, tmp_path, tmp_path).name == f"{cell}.3x4.1x2.safetensors"
    given.samples = 5
    with pytest.raises(RuntimeError, match="ended with 3"):
        ptq_peers.make(cell, given, tmp_path, tmp_path)


@pytest.mark.whole
def test_a_driver_saves_what_it_took(tmp_path):
    """The shared half of all drivers, as a process of its own: only torch and safetensors are needed."""
    save_file({"ids": IDS}, tmp_path / "ids.safetensors")
    code = (
        "from driver import *\n"
        "given = arguments(('rtn',))\n"
        "dense, took = timed(lambda: {'w': given.ids.bfloat16()})\n"
        "save(given, dense, took, torch.float16, 'all', ())\n"
    )
    script = tmp_path / "run.py"
    script.write_text(f"import sys; sys.path.insert(0, {str(ROOT / 'scripts' / 'reproduce' / 'peers')!r})\n{code}")
    out = tmp_path / "out.safetensors"
    command = [sys.executable, str(script), "--model", "m", "--ids", str(tmp_path / "ids.safetensors")]
    subprocess.run([*command, "--out", str(out), "--method", "rtn", "--bits", "4"], check=True)
    from safetensors import safe_open

    with safe_open(out, framework="pt") as file:
        row = json.loads(file.metadata()["row"])
        assert torch.equal(file.get_tensor("w"), IDS.float())
    assert row["scale_dtype"] == "float16"
    assert row["peak_mem_mb"] > 10
    kept = {"seconds", "cpu_seconds", "peak_mem_mb", "device", "scale_dtype", "settings", "versions"}
    assert set(row) == kept


def test_rows_that_are_there_are_not_made_again(tmp_path):
    import ptq_peers
    from results import read

    made = []

    def produce(cell):
        made.append(str(cell))
        if cell.tool == "gptqmodel":
            raise RuntimeError("no compiler")
        return a_row(cell.tool, cell.method, [1.0, 2.0], [0.0, 0.0])

    wanted, file = ptq_peers.cells(["llmcompressor", "gptqmodel", "qat"], ["gptq"], [4]), tmp_path / "x.json"

    def fill(wanted, calibration="a"):
        content = read(file) | {"meta": {"commit": "c"}}
        return ptq_peers.fill(file, content, dict.fromkeys(wanted, calibration), produce)

    assert fill(wanted[:2]) == wanted[1:2]
    assert fill(wanted) == wanted[1:2]
    names = [str(cell) for cell in wanted]
    assert made == [*names[:2], *names[1:]], "what failed is tried again, what is there is not"
    assert [row["tool"] for row in read(file)["rows"]] == ["llmcompressor", "qat"]
    assert [(one["tool"], one["ours"]) for one in read(file)["pairs"]] == [("llmcompressor", "gptq")]
    assert fill(wanted[:1], "b") == []
    assert {row["tool"]: row["calibration"] for row in read(file)["rows"]} == {"llmcompressor": "b", "qat": "a"}


def test_rows_are_told_by_tokens_and_by_autorounds_steps():
    import ptq_peers

    given = Namespace(samples=16, seq_len=512, steps=64, batch_size=2)
    said = [ptq_peers.calibrated(ptq_peers.Cell("qat", method, 2), given) for method in ("gptq", "autoround")]
    assert said == ["16 x 512 of train, seed 0", "16 x 512 of train, seed 0, 64 steps of 2"]
    for name in ("ptq_peers.json", "ptq_peers_gpu.json"):
        rows = json.loads((ROOT / "scripts/results" / name).read_text(encoding="utf-8"))["rows"]
        assert all(("steps of" in row["calibration"]) == (row["method"] == "autoround") for row in rows[1:])


@pytest.mark.parametrize("name", ["ptq_peers.json", "ptq_peers_gpu.json"])
def test_the_readme_says_what_the_file_says_and_the_file_what_its_rows_say(name):
    import ptq_peers

    content = json.loads((ROOT / "scripts/results" / name).read_text(encoding="utf-8"))
    assert content["pairs"] == ptq_peers.pairs(content["rows"])
    for text in ptq_peers.pairs_tables(content["pairs"]):
        marked = f"<!-- from: scripts/results/{name} -->\n{text}\n\n"
        assert marked in (ROOT / "README.md").read_text(encoding="utf-8")
