import json
from pathlib import Path

import pytest

from qat.cli.main import main
from qat.engine.loader import open_checkpoint
from qat.formats.base import quantized_digests

pytestmark = pytest.mark.whole


def export(finished, tmp_path, *more):
    return main(["export", f"runs={finished.runs}", f"out={tmp_path / 'out'}", *more])


def digests(path):
    tensors = open_checkpoint(path).tensors
    return {key: value for name in tensors for key, value in quantized_digests(name, tensors[name]).items()}


def test_the_trained_arm_again_has_the_same_codes(finished, tmp_path, capsys):
    before = {p.name: p.read_bytes() for p in finished.path.glob("*.json")}
    assert export(finished, tmp_path) == 0
    out = capsys.readouterr().out
    assert str(tmp_path / "out") in out
    assert "train == serve: VERIFIED" in out
    assert digests(tmp_path / "out") == digests(finished.path / "export" / "compressed_tensors")
    certificate = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert certificate["checks"]["captured"]["equal"] == 7
    assert {p.name: p.read_bytes() for p in finished.path.glob("*.json")} == before


@pytest.mark.parametrize("arm", ["rtn", "gptq", "awq"])
def test_a_post_training_arm(finished, tmp_path, capsys, arm):
    """GPTQ and AWQ are taken from the kept blocks; nothing is searched again."""
    assert export(finished, tmp_path, f"arm={arm}") == 0
    assert f"{arm}: block" not in capsys.readouterr().out
    certificate = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert certificate["arm"] == arm
    text = (tmp_path / "out" / "README.md").read_text()
    ppl = json.loads((finished.path / "summary.json").read_text())["arms"][arm]["ppl"]
    assert f"| **{arm}** | {ppl:.3f} | " in text
    assert certificate["verified"]
    assert "not applicable" in certificate["captured"]


def test_arms_have_codes_of_their_own(finished, tmp_path):
    assert export(finished, tmp_path, "arm=rtn") == 0
    assert digests(tmp_path / "out") != digests(finished.path / "export" / "compressed_tensors")


def test_static_inputs_are_those_of_the_run(finish, tmp_path, capsys):
    """The arm again has the ranges that were calibrated; the file alone gives the run's numbers."""
    recipe = Path(__file__).parents[2] / "configs" / "recipe" / "w8a8_static.yaml"
    run = finish("ptq", f"recipe={recipe}", "method=rtn")
    written = run.path / "export" / "compressed_tensors"
    assert main(["eval", str(written), f"runs={run.runs}", "device=cpu"]) == 0
    row, summary = json.loads(capsys.readouterr().out), json.loads((run.path / "summary.json").read_text())
    assert row["nll"] == pytest.approx(summary["arms"]["rtn"]["nll"], rel=1e-9)
    assert summary["arms"]["rtn"]["bytes"] == (written / "model.safetensors").stat().st_size
    assert export(run, tmp_path) == 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (written / "model.safetensors").read_bytes()


def test_a_checkpoint_becomes_one_of_another_format(finished, tmp_path, capsys):
    """No run is asked: the checkpoint alone, its certificate and its reference logits."""
    source = finished.path / "export" / "compressed_tensors"
    arguments = [f"runs={tmp_path / 'none'}", f"from={source}", "format=gptq", f"out={tmp_path / 'out'}"]
    assert main(["export", *arguments]) == 0
    out = capsys.readouterr().out
    assert "train == serve: VERIFIED" in out
    assert "other loaders decode the same weights, difference 0: not checked" in out
    assert "no library here decodes GPTQ's layout" in out
    certificate = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert (certificate["arm"], certificate["captured"]["equal"]) == ("qat", 7)
    assert certificate["converted_from"]["format"] == "compressed-tensors"
    assert digests(tmp_path / "out") == digests(source)
    assert main(["verify", str(tmp_path / "out")]) == 0


def test_a_conversion_takes_no_arm_and_needs_a_checkpoint(tmp_path, capsys):
    assert main(["export", f"from={tmp_path}", "arm=gptq", "format=none"]) == 2
    err = capsys.readouterr().err
    assert "arm: from=DIR converts a checkpoint" in err
    assert "format.name: from=DIR is written in a format" in err
    assert f"from: {tmp_path} is no checkpoint: it holds no config.json" in err


def test_an_arm_in_another_format(finished, tmp_path):
    assert export(finished, tmp_path, "arm=gptq", "format=gptq") == 0
    certificate = json.loads((tmp_path / "out" / "verify.json").read_text())
    assert certificate["verified"]
    assert "converted_from" not in certificate


def test_an_arm_that_the_run_does_not_have(finished, tmp_path, capsys):
    assert export(finished, tmp_path, "arm=autoround") == 1
    assert capsys.readouterr().err == "qat export: arm=autoround: the run has qat, rtn, gptq, awq\n"


def test_a_directory_with_something_else_in_it_is_not_overwritten(finished, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("years of work")
    assert export(finished, tmp_path, "arm=rtn") == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert (tmp_path / "out" / "thesis.txt").read_text() == "years of work"


def test_without_a_run(tmp_path, capsys):
    assert main(["export", f"runs={tmp_path}"]) == 1
    assert "run=latest: no run at" in capsys.readouterr().err
