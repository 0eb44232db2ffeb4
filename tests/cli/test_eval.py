import json
import math
from types import SimpleNamespace

import pytest

from qat.cli.eval import count_of
from qat.cli.main import main


def lines(path):
    return [json.loads(line) for line in (path / "evaluations.jsonl").read_text().splitlines()]


def test_the_runs_own_export_on_the_runs_own_windows(finished, capsys):
    """What the run said of its arm is found again, from the file alone."""
    (finished.path / "evaluations.jsonl").unlink(missing_ok=True)
    assert main(["eval", f"runs={finished.runs}", "device=cpu"]) == 0
    row = json.loads(capsys.readouterr().out)
    arm = json.loads((finished.path / "summary.json").read_text())["arms"]["qat"]
    for key in ("ppl", "nll", "kl", "top1_agree", "tokens"):
        assert row[key] == pytest.approx(arm[key], rel=1e-9), key
    assert row["ppl"] == pytest.approx(math.exp(row["nll"]))
    assert row["split"] == "test"
    assert row["dtype"] == "float32"
    assert row["kl_se"] > 0
    facts = json.loads((finished.path / "run.json").read_text())
    assert row["data"] == facts["data"]["fingerprint"]
    assert lines(finished.path) == [row]


def test_other_windows_of_another_split(finished, capsys):
    path = finished.path / "export" / "compressed_tensors"
    more = ["split=validation", "evaluation.windows=2", "evaluation.seq_len=16", "device=cpu"]
    assert main(["eval", str(path), f"runs={finished.runs}", *more]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["tokens"] == 2 * 15
    assert row["seq_len"] == 16
    assert row["split"] == "validation"
    assert lines(finished.path)[-1] == row


def test_of_a_shorter_split_the_runs_number_of_windows_is_what_there_is():
    tokens, sizes = SimpleNamespace(streams={"validation": range(39)}), {"windows": 12, "seq_len": 4}
    assert count_of(tokens, "validation", sizes, True) == 9
    assert count_of(tokens, "validation", sizes | {"windows": 3}, True) == 3
    assert count_of(tokens, "validation", sizes, False) == 12  # asked for, and so refused
    assert count_of(tokens, "validation", sizes | {"windows": None}, True) is None  # the run took the whole split


def test_more_windows_than_there_are(finished, capsys):
    assert main(["eval", f"runs={finished.runs}", "evaluation.windows=99", "device=cpu"]) == 1
    err = capsys.readouterr().err
    assert "99 asked for" in err
    assert err.count("\n") == 1


def test_without_a_run(tmp_path, capsys):
    assert main(["eval", f"runs={tmp_path}"]) == 1
    assert "run=latest: no run at" in capsys.readouterr().err


def test_a_checkpoint_of_another_model(finished, tmp_path, capsys):
    import shutil

    copy = shutil.copytree(finished.path / "export" / "compressed_tensors", tmp_path / "ct")
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    assert main(["eval", str(copy), f"runs={finished.runs}", "device=cpu"]) == 1
    err = capsys.readouterr().err
    assert "vocabulary 300, the run's 256" in err
    assert err.count("\n") == 1


def test_a_checkpoint_of_a_model_of_another_depth(finished, tmp_path, capsys):
    from tiny_export import export

    export(tmp_path / "ct")  # two layers; the run's model has one
    assert main(["eval", str(tmp_path / "ct"), f"runs={finished.runs}", "device=cpu"]) == 1
    err = capsys.readouterr().err
    assert "not a checkpoint of the run's model; one of them lacks model.layers.1" in err
