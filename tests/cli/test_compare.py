import importlib
import json
import shutil

import pytest
import yaml

from qat.cli.main import main


@pytest.fixture
def other(finished, tmp_path):
    """The finished run once more, with another learning rate and another text."""
    path = shutil.copytree(finished.path, tmp_path / "run" / "other")
    config = yaml.safe_load((path / "config.yaml").read_text())
    config["optim"]["lr"] = 0.125
    (path / "config.yaml").write_text(yaml.safe_dump(config))
    facts = json.loads((path / "run.json").read_text())
    facts["data"]["fingerprint"] = "other"
    (path / "run.json").write_text(json.dumps(facts))
    return path


def test_one_run(finished, capsys):
    assert main(["compare", str(finished.runs / "latest")]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ("fp", "rtn", "gptq", "awq", "qat"))


def test_latest_is_the_newest_with_a_result(finished, tmp_path, monkeypatch, capsys):
    shutil.copytree(finished.path, tmp_path / "ptq" / "old")
    shutil.copytree(finished.path, tmp_path / "ptq" / "new")
    (tmp_path / "ptq" / "new" / "summary.json").unlink()
    (tmp_path / "latest").symlink_to("ptq/new")
    monkeypatch.setenv("QAT_RUNS", str(tmp_path))
    for name in ("latest", "run=latest"):
        assert main(["compare", name]) == 0
        found = capsys.readouterr()
        assert "gptq" in found.out
        assert f"the newest that has: {tmp_path / 'ptq' / 'old'}" in found.err
    assert main(["compare", str(tmp_path / "latest")]) == 1
    assert "the run has no result yet" in capsys.readouterr().err


def test_two_runs_as_json(finished, other, capsys):
    assert main(["compare", str(finished.path), str(other), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["differing"] == {"optim.lr": [1e-4, 0.125]}
    (warning,) = found["warnings"]
    assert warning.startswith("data (fingerprints) differ")
    assert len(found["rows"]) == 10
    assert found["rows"][5]["delta"] == {"ppl": 0, "nll": 0, "kl": 0, "top1_agree": 0}


def test_two_runs_as_markdown(finished, other, capsys):
    assert main(["compare", str(finished.path), str(other), "--md"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("**WARNING**: data (fingerprints) differ")
    assert "| optim.lr | 0.0001 | 0.125 |" in out


def test_plots(finished, tmp_path, capsys):
    assert main(["compare", str(finished.path), "--md", "--plots", str(tmp_path / "a" / "b")]) == 0
    assert f"plot: {tmp_path / 'a' / 'b' / 'ppl_vs_size.png'}" in capsys.readouterr().out
    assert (tmp_path / "a" / "b" / "kl_vs_size.png").is_file()


def test_plots_without_matplotlib_name_the_extra(finished, tmp_path, capsys, monkeypatch):
    load = importlib.import_module

    def refuse(name, *args):
        if name == "matplotlib":
            raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
        return load(name, *args)

    monkeypatch.setattr(importlib, "import_module", refuse)
    assert main(["compare", str(finished.path), "--md", "--plots", str(tmp_path)]) == 1
    assert capsys.readouterr().err == "qat compare: matplotlib is not installed: pip install 'qat[report]'\n"


def test_what_is_no_run(tmp_path, capsys):
    assert main(["compare", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"qat compare: run={tmp_path}: no run at {tmp_path}")
    assert err.count("\n") == 1
