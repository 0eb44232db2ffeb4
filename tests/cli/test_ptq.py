import json

import pytest


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
