"""The README's tables of runs are what the script makes of their files, and these say what a run's summary says."""

import json
import math
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = sorted((ROOT / "scripts" / "results").glob("quickstart_*.json"))


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import results_table

    return results_table


def opened(file):
    content = json.loads(file.read_text(encoding="utf-8"))
    (meta,) = content["meta"]["runs"]
    return {"meta": meta, "rows": content["rows"]}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_readme_says_what_the_file_says(file, script):
    """To the letter: what ran, its cost, the table, what was recovered."""
    run = opened(file)
    marked = f"<!-- from: scripts/results/{file.name} -->\n{script.table(run)}"
    assert "\n\n".join(["", script.headline(run), marked, script.recovered(run), ""]) in README


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_file_agrees_with_itself(file):
    """Recovered fractions follow from the rows; perplexity from nll; and all checks of the certificate passed."""
    run = opened(file)
    arms = {row["arm"]: row for row in run["rows"]}
    assert list(arms) == ["fp", "rtn", "gptq", "awq", "qat"]
    ptq = [arms[name] for name in ("rtn", "gptq", "awq")]
    for row in arms.values():
        assert row["ppl"] == pytest.approx(math.exp(row["nll"]), rel=1e-12)
        assert (row["recipe"], row["device"]) == (run["meta"]["recipe"], run["meta"]["device"])
    best = run["meta"]["recovered"]["vs_best_ptq"]
    for key, floor in (("kl", 0.0), ("nll", arms["fp"]["nll"])):
        other = min(ptq, key=lambda row, key=key: row[key])
        assert best[key]["winner"] == other["arm"]
        expected = (other[key] - arms["qat"][key]) / (other[key] - floor)
        assert best[key]["value"] == pytest.approx(expected, rel=1e-9)
    export = run["meta"]["export"]
    assert all(export[key] is True for key in ("verified", "codes_equal", "weights_equal", "greedy_equal"))
    assert len(run["meta"]["commit"]) == 40


def test_a_file_holds_what_the_run_says(script, tmp_path, monkeypatch, capsys):
    arm = dict.fromkeys(script.KEPT, 1.5) | {"peak_mem_mb": 7, "windows": [1]}
    recovered = {"vs_best_ptq": {"kl": {"value": 0.25, "winner": "awq"}, "nll": {"value": None, "winner": None}}}
    summary = {
        "arms": {"fp": arm | {"ppl": 2.0}, "qat": arm},
        "recovered": recovered,
        "export": {"path": "/somewhere", "verified": False},
        "cost": {"run_seconds": 3.4, "run_cpu_seconds": 5.6, "run_peak_mem_mb": 7},
    }
    facts = {
        "device": "a machine",
        "git": {"sha": "abcdef0123456", "dirty": True},
        "versions": {},
        "started": "2026-01-02T03:04",
        "threads": 2,
        "data": {"fingerprint": "f"},
    }
    for name, content in (("summary.json", summary), ("run.json", facts)):
        (tmp_path / name).write_text(json.dumps(content))
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({"choices": {"recipe": "w4"}}))
    run = script.read(tmp_path)
    assert (run["meta"]["commit"], run["meta"]["dirty"]) == ("abcdef0123456", True)
    assert "path" not in run["meta"]["export"]
    assert [(row["arm"], row["ppl"], "windows" in row) for row in run["rows"]] == [
        ("fp", 2.0, False),
        ("qat", 1.5, False),
    ]
    said = script.headline(run)
    assert "commit abcdef012, with changes, 2026-01-02: the run took 3 s and 6 CPU s; 7 MB at its peak." in said
    assert "NOT verified" in said
    assert "| fp | 2.000 | 1.5000 |" in script.table(run)
    assert script.recovered(run) == "Recovered against the best PTQ: 25.0 % of the kl of awq."
    monkeypatch.setattr("sys.argv", ["x", str(tmp_path), "--json", str(tmp_path / "out.json"), "--commit", "f" * 40])
    assert script.main() == 0
    meta = json.loads((tmp_path / "out.json").read_text())["meta"]["runs"][0]
    assert (meta["commit"], meta["dirty"]) == ("f" * 40, False)
    assert f"commit {'f' * 9}, 2026" in capsys.readouterr().out


def test_a_run_that_has_not_ended_is_refused(script, tmp_path):
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "summary.json").write_text(json.dumps({"arms": {"fp": {}}}))
    with pytest.raises(SystemExit, match="has not ended"):
        script.read(tmp_path)
