import json

import pytest


@pytest.mark.parametrize("method", ["rtn", "mse_rtn", "gptq", "awq"])
def test_one_method_exported_and_verified(finish, method):
    run = finish("ptq", f"method={method}")
    summary = json.loads((run.path / "summary.json").read_text())
    assert list(summary["arms"]) == ["fp", method]
    assert summary["export"]["verified"]
    assert "recovered" not in summary
    certificate = json.loads((run.path / "export" / "compressed_tensors" / "verify.json").read_text())
    assert certificate["arm"] == method
    assert not list(run.path.glob("checkpoints/step=*"))


def test_it_finds_what_the_whole_comparison_finds(finish, finished):
    arms = [
        json.loads((run.path / "summary.json").read_text())["arms"]["gptq"]
        for run in (finish("ptq", "method=gptq"), finished)
    ]
    assert arms[0]["windows"] == arms[1]["windows"]
