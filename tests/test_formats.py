"""The table of formats: every cell is a command that composes, and a verdict is what the certificate says."""

import json
import re
from pathlib import Path

import pytest

from qat.cli.tree import Tree
from qat.cli.validate import validate
from qat.cli.verbs import VERBS

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "reproduce"))
    monkeypatch.chdir(ROOT)


@pytest.mark.whole
def test_every_cell_composes_and_binds():
    import formats

    assert len({cell.name for cell in formats.CELLS}) == len(formats.CELLS)
    for cell in formats.CELLS:
        assert re.fullmatch(r"[\w ]+", cell.name), "it names a folder, which an override names"
        config, problems = validate(VERBS["ptq"], [*formats.COMMON, *cell.overrides], Tree.of([]), files=False)
        assert not problems, (cell, problems)
        assert config["method"]["_target_"] == "qat.ptq.rtn.rtn"


CHECKS = {
    "tensors": {"passed": True},
    "library": {"passed": True, "max_abs_diff": 0.0},
    "transformers": {"passed": True, "max_abs_diff": 0.0, "max_abs_logit_diff": 2e-6, "max_abs_logit": 30.0},
    "engine": {"passed": True, "max_abs_logit_diff": 1e-5, "max_abs_logit": 30.0, "max_kl": 1e-9, "greedy_equal": 3},
    "fast_path": {"passed": False, "kl": 0.5},
}


def test_a_verdict_is_what_the_certificate_says():
    import formats

    good = {"verified": True, "checks": CHECKS, "unchecked": ["x"]}
    row = formats.judged(good, "")
    assert row["verdict"] == "VERIFIED", "the fast path proves nothing"
    assert (row["engine_logit_diff"], row["reader_logit_diff"], row["reader_weight_diff"]) == (1e-5, 2e-6, 0.0)
    assert row["engine_max_kl"] == 1e-9
    assert row["readers"] == ["library", "transformers"]
    bad = {"verified": False, "checks": CHECKS | {"tensors": {"passed": False}}, "unchecked": []}
    assert formats.judged(bad, "")["verdict"] == "FAILED: tensors"
    assert formats.judged(bad | {"checks": {}}, "why")["verdict"] == "FAILED: why"
    assert formats.judged(good | {"verified": False}, "why")["verdict"] == "FAILED: why"


def run(monkeypatch, file, *more):
    import formats

    monkeypatch.setattr("sys.argv", ["formats.py", "--json", str(file), *more])
    return formats.main()


def test_what_the_json_holds_is_not_made_again_and_what_fails_is_said(tmp_path, monkeypatch, capsys):
    import formats

    asked, verdicts = [], {"w8a8": "VERIFIED", "fp8": "refused", "w4a8": "FAILED"}

    def made(cell, work, again):
        asked.append(cell.name)
        return {"cell": cell.name, "verdict": verdicts[cell.name], "mb": 12.34, "seconds": 3.0}

    monkeypatch.setattr(formats, "made", made)
    file = tmp_path / "formats.json"
    assert run(monkeypatch, file, "w8a8", "fp8") == 0
    assert run(monkeypatch, file, "w8a8", "fp8") == 0
    assert asked == ["w8a8", "fp8"]
    assert run(monkeypatch, file, "w8a8", "w4a8") == 1
    assert asked == ["w8a8", "fp8", "w4a8"]
    assert [row["cell"] for row in json.loads(file.read_text())["rows"]] == asked
    verdicts["w4a8"] = "VERIFIED"  # mended: what failed is made again, and takes its own place
    assert run(monkeypatch, file, "w8a8", "w4a8") == 0
    assert [row["verdict"] for row in json.loads(file.read_text())["rows"]] == ["VERIFIED", "refused", "VERIFIED"]
    with pytest.raises(SystemExit):
        run(monkeypatch, file, "w9")
    assert "| `w8a8` | — | VERIFIED | — | 12.3 | — | — | — | 3 |" in capsys.readouterr().out


def test_a_command_that_writes_nothing_is_refused_only_for_the_known_reason(tmp_path, monkeypatch):
    import formats

    monkeypatch.setattr(formats, "qat", lambda *_: "qat ptq: q_proj: a scale is none that fp16 holds")
    (known,) = (cell for cell in formats.CELLS if cell.refused)
    assert formats.made(known, tmp_path, False)["verdict"] == "refused"
    assert formats.made(formats.CELLS[0], tmp_path, True)["verdict"] == "FAILED"
    monkeypatch.setattr(formats, "qat", lambda *_: "MemoryError")
    assert formats.made(known, tmp_path, False)["verdict"] == "FAILED"
