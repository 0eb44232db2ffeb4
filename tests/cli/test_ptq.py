import json

import pytest
from tiny_run import arguments

from qat.cli.main import main

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def gptq(finish):
    return finish("ptq", "method=gptq")


def summary(run):
    return json.loads((run.path / "summary.json").read_text())


def exported(run, method):
    assert list(summary(run)["arms"]) == ["fp", method]
    assert summary(run)["export"]["verified"]
    assert "recovered" not in summary(run)
    certificate = json.loads((run.path / "export" / "compressed_tensors" / "verify.json").read_text())
    assert certificate["arm"] == method
    assert not list(run.path.glob("checkpoints/step=*"))


def test_one_method_exported_and_verified(gptq):
    exported(gptq, "gptq")


def test_a_method_that_the_whole_comparison_does_not_have(finish):
    exported(finish("ptq", "method=mse_rtn"), "mse_rtn")


def test_block_wise_training_is_a_method_too(finish):
    run = finish("ptq", "method=blockwise", "method.train=[scales,round]")
    exported(run, "blockwise")
    assert (run.path / "checkpoints/blockwise/block-0000.safetensors").is_file()


@pytest.mark.parametrize("name", ["awq", "gguf"])
def test_another_format_is_written_read_back_and_verified(finish, name):
    run = finish("ptq", "method=rtn", f"format={name}")
    export = summary(run)["export"]
    assert (export["verified"], export["codes_equal"], export["weights_equal"]) == (True, True, True)
    certificate = json.loads((run.path / "export" / name / "verify.json").read_text())
    assert certificate["verified"]
    arm = summary(run)["arms"]["rtn"]
    assert arm["bits_per_quantized_weight"] == (4.625 if name == "awq" else 4.5)  # AWQ has zeros, always
    assert main(["eval", f"runs={run.runs}", "device=cpu"]) == 0
    row = json.loads((run.path / "evaluations.jsonl").read_text())
    assert row["ppl"] == pytest.approx(arm["ppl"], rel=1e-6)
    weights = run.path / "export" / name / ("model.safetensors" if name == "awq" else "model.gguf")
    assert abs(arm["bytes"] - weights.stat().st_size) < (1 if name == "awq" else 4096)  # another header


def test_dynamic_groups_are_verified_and_exported_where_they_are_carried(finish, tmp_path, capsys):
    run = finish("ptq", "method=gptq", "method.act_order=dynamic", "format=gptq")
    assert summary(run)["export"]["verified"]
    assert json.loads((run.path / "export/gptq/config.json").read_text())["quantization_config"]["desc_act"]
    again = ("export", f"runs={run.runs}", f"out={tmp_path / 'out'}")
    assert main([*again, "format=compressed_tensors"]) == 0
    assert "other loaders decode the same weights, difference 0: not checked" in capsys.readouterr().out
    assert main([*again, "format=awq"]) == 1
    said = capsys.readouterr()
    assert "arm=gptq: dynamic needs a g_idx, which format=awq cannot carry; use group or static" in said.err
    assert "block" not in said.out


def test_what_a_format_cannot_say_is_refused_before_anything_is_loaded(root, capsys):
    more = ("format=awq", "recipe.rules.linears.weight.grid.bits=3")
    assert main(arguments(root, "ptq", "method=rtn", *more)) == 2
    assert "recipe.rules.linears.weight.grid: format=awq carries integers of 4 bits" in capsys.readouterr().err


def test_it_finds_what_the_whole_comparison_finds(gptq, finished):
    assert summary(gptq)["arms"]["gptq"]["windows"] == summary(finished)["arms"]["gptq"]["windows"]


def test_keys_and_values_are_quantized_in_every_arm_but_full_precision(finish, gptq):
    run = finish("ptq", "method=gptq", "kv=int4")
    exported(run, "gptq")
    mine, without = summary(run)["arms"], summary(gptq)["arms"]
    assert mine["fp"]["windows"] == without["fp"]["windows"]
    assert mine["gptq"]["kl"] > without["gptq"]["kl"]
    assert mine["gptq"]["bytes"] == without["gptq"]["bytes"], "a cache needs no tensor in the file"
    engine = json.loads((run.path / "export" / "compressed_tensors" / "verify.json").read_text())["checks"]["engine"]
    assert (engine["kv"], engine["dtype"]) == ("int4", "float64")
    assert "keys and values: int4, a scale for each token and head, in every arm but fp" in run.out
