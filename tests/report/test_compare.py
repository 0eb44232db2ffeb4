import json

import pytest

from qat.report.compare import METRICS, as_markdown, compare
from qat.report.runs import read


@pytest.fixture
def two(write):
    changed = {"arms.gptq.ppl": 12.5, "arms.gptq.nll": 1.25, "arms.gptq.kl": 0.25, "arms.gptq.top1_agree": 0.75}
    a = write("a")
    b = write("b", config={"optim.lr": 3e-4}, summary=changed | {"arms.awq": {**read(a).arms["gptq"]}})
    return [read(a), read(b)]


def test_a_row_for_each_arm_of_each_run(two):
    found = compare(two)
    assert [(row["run"], row["arm"]) for row in found["rows"]] == [
        *(("quick/a", name) for name in ("fp", "gptq", "qat")),
        *(("quick/b", name) for name in ("fp", "gptq", "qat", "awq")),
    ]
    assert all(row.keys() >= set(METRICS) for row in found["rows"])
    assert found["rows"][1]["ppl"] == 12.0
    json.dumps(found)


def test_deltas_are_taken_against_the_same_arm_of_the_first_run(two):
    rows = {(row["run"], row["arm"]): row for row in compare(two)["rows"]}
    expected = {"ppl": 0.5, "nll": 0.05, "kl": 0.05, "top1_agree": -0.05}
    assert rows["quick/b", "gptq"]["delta"] == pytest.approx(expected)
    assert rows["quick/b", "fp"]["delta"] == dict.fromkeys(expected, 0.0)
    assert "delta" not in rows["quick/b", "awq"]
    assert not any("delta" in row for (run, _), row in rows.items() if run == "quick/a")


def test_only_what_differs_of_the_configs_is_said(two):
    assert compare(two)["differing"] == {"optim.lr": [1e-4, 3e-4]}
    text = as_markdown(compare(two))
    assert "| optim.lr | 0.0001 | 0.0003 |" in text
    assert "seed" not in text


def test_doubts_come_first(write):
    a = read(write("a"))
    b = read(write("b", facts={"data.fingerprint": "x"}, summary={"export.verified": False}))
    found = compare([a, b])
    assert len(found["warnings"]) == 2
    lines = as_markdown(found).splitlines()
    assert lines[0].startswith("**WARNING**: data (fingerprints) differ")
    assert lines[2].startswith("**WARNING**: quick/b: the export is not verified")


def test_one_run_alone(write):
    text = as_markdown(compare([read(write("a"))]))
    assert "Δ" not in text
    assert "config key" not in text
    assert "| quick/a | gptq | 12.000 | 0.2000 | 0.800 | 4.25 | 0.7 | 12 |" in text


def test_deltas_in_markdown(two):
    text = as_markdown(compare(two))
    assert "| quick/b | gptq | 12.500 | 0.2500 | 0.750 | 4.25 | 0.7 | 12 | +0.500 | +0.0500 |" in text
    assert "| quick/b | awq | 12.000 | 0.2000 | 0.800 | 4.25 | 0.7 | 12 |  |  |" in text


def test_equal_configs_are_said_to_be_equal(write):
    text = as_markdown(compare([read(write("a")), read(write("b"))]))
    assert text.endswith("The runs have the same configuration.")
