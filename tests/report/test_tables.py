import io

import pytest
from rich.console import Console

from qat.report.tables import COLUMNS, arm_rows, arms_table, export_lines, markdown, recovered_lines, warnings

ARM = {
    "ppl": 12.3456,
    "kl": 0.12345,
    "top1_agree": 0.9876,
    "bits_per_weight": 5.126,
    "bytes": 123_456_789,
    "seconds": 61.6,
    "cpu_seconds": 99.4,
    "peak_mem_mb": 321,
    "fallbacks": [],
}
EXPORT = {
    "path": "export",
    "verified": True,
    "codes_equal": True,
    "files_changed": [],
    "weights_equal": True,
    "max_abs_logit_diff": 1.25e-5,
    "max_kl": 2e-9,
    "greedy_equal": True,
    "fast_path": {"kl": 1e-4, "top1_agree": 0.99, "flips": [{}, {}], "passed": True},
}


def test_one_row_for_each_arm_in_the_order_of_the_columns():
    (row,) = arm_rows({"gptq": ARM})
    assert row == ["gptq", "12.346", "0.1235", "0.988", "5.13", "123.5", "62", "99", "321"]
    assert len(row) == len(COLUMNS)


def test_a_fallback_is_marked():
    rows = arm_rows({"gptq": ARM | {"fallbacks": ["model.layers.0.mlp.up_proj"]}, "rtn": ARM})
    assert [row[0] for row in rows] == ["gptq*", "rtn"]


def test_the_table_shows_every_arm_and_column():
    out = io.StringIO()
    Console(file=out, width=120).print(arms_table({"fp": ARM, "qat": ARM}, "Title"))
    text = out.getvalue()
    assert all(word in text for word in ("Title", *COLUMNS, "fp", "qat", "12.346"))


def test_markdown():
    assert markdown(["a", "b"], [["1", "2"], ["3", "4"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |"


def test_recovered_in_sentences():
    best = {"kl": {"value": 0.5, "winner": "gptq"}, "nll": {"value": None, "winner": "awq"}, "candidates": []}
    lines = recovered_lines({"vs_gptq": {"kl": 0.4567, "nll": None}, "vs_best_ptq": best})
    assert lines == [
        "recovered against gptq: kl 45.7 %, nll n/a (the loss is within noise)",
        "recovered against the best PTQ: kl 50.0 % (gptq), nll n/a (the loss is within noise) (awq)",
    ]
    assert recovered_lines({}) == []


def test_a_verified_export_in_lines():
    first, codes, weights, engine, fast = export_lines(EXPORT)
    assert first == "train == serve: VERIFIED"
    assert codes.endswith(": yes")
    assert weights.endswith(": yes")
    assert "1.25e-05, KL of a token 2.00e-09, greedy tokens equal: yes" in engine
    assert "KL 1.00e-04, top-1 agreement 0.9900, flips 2 (all near ties: yes)" in fast


def test_a_failed_check_and_one_that_was_not_made_look_different():
    changes = {
        "verified": False,
        "codes_equal": False,
        "greedy_equal": None,
        "max_abs_logit_diff": None,
        "max_kl": None,
    }
    lines = export_lines(EXPORT | changes | {"fast_path": None})
    assert lines[0] == "train == serve: NOT VERIFIED"
    assert lines[1].endswith(": NO")
    assert "logit difference not measured, KL of a token not measured, greedy tokens equal: not checked" in lines[3]
    assert len(lines) == 4
    lines = export_lines(EXPORT | {"verified": False, "files_changed": ["config.json", "tokenizer.json"]})
    assert lines[2].endswith("are those that were written: NO (config.json, tokenizer.json)")


def test_without_a_file_it_says_what_is_known_of_the_weights():
    nothing = {"path": None, "verified": None}
    (line,) = export_lines(nothing | {"captured": {"modules": 7, "equal": 7}})
    assert line.endswith("the codes are those that training saw")
    (line,) = export_lines(nothing | {"captured": "not applicable: no training graph"})
    assert line.endswith("weights not applicable: no training graph")


@pytest.fixture
def summary():
    return {"arms": {"fp": ARM | {"ppl": 10.0}, "gptq": ARM, "qat": ARM}, "export": EXPORT}


def test_nothing_to_warn_of(summary):
    assert warnings(summary) == []


def test_training_that_fitted_the_text_is_a_warning(summary):
    summary["arms"]["qat"] = ARM | {"ppl": 9.9}
    (line,) = warnings(summary)
    assert line.startswith("qat's perplexity is below full precision's")


def test_fallbacks_are_a_warning(summary):
    summary["arms"]["gptq"] = ARM | {"fallbacks": ["a.b", "a.c"]}
    (line,) = warnings(summary)
    assert line == "gptq fell back to round-to-nearest in 2 modules, first a.b (marked *)"


def test_an_unverified_export_is_a_warning(summary):
    summary["export"] = EXPORT | {"verified": False}
    assert warnings(summary) == ["the export is not verified: see verify.json beside it"]
    del summary["export"]
    assert warnings(summary) == []
