import json

import pytest

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
