"""The README's tables of runs are what the script makes of their files, and these say what a run's summary says."""

import json
import re
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


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_readme_has_the_table_of_the_file(file, script):
    """The whole table, cell by cell; what was recovered; the commit."""
    content = json.loads(file.read_text(encoding="utf-8"))
    (meta,) = content["meta"]["runs"]
    lines = script.table({"meta": meta, "rows": content["rows"]}).splitlines()
    before, _, after = README.partition(f"<!-- from: scripts/results/{file.name} -->\n")
    assert after.startswith("\n".join(line for line in lines if line.startswith("|")) + "\n\n")
    best = meta["recovered"]["vs_best_ptq"]
    said = after.partition("\n\n")[2].split("\n")[0]
    kl, nll = (f"{100 * best[key]['value']:.1f} %" for key in ("kl", "nll"))
    assert {best[key]["winner"] for key in ("kl", "nll")} == {"gptq"}
    assert said == f"Recovered against the best PTQ (GPTQ): {kl} of its KL, {nll} of its loss in nll."
    above = " ".join(before.strip().splitlines()[-3:])
    assert meta["export"]["verified"] is True
    assert "erified" in above
    commits = re.findall(r"[Cc]ommit ([0-9a-f]{7,40})", before)
    assert commits
    assert meta["commit"].startswith(commits[-1])
    seconds = {int(number) for number in re.findall(r"(\d+) s\b", above)}
    assert round(meta["cost"]["run_seconds"]) in seconds


def test_a_file_holds_what_the_run_says(script, tmp_path):
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
    text = script.table(run)
    assert "commit abcdef012, with changes" in text
    assert "| fp | 2.000 | 1.5000 |" in text
    assert "kl 0.250 (awq); verified: False; 3 s, 6 CPU s, peak 7 MB" in text
