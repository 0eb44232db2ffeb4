"""The card's numbers are the summary's, and its words those of the certificate."""

import copy

import pytest
import yaml

from qat.numerics.granularity import PerGroup
from qat.numerics.grid import IntGrid
from qat.numerics.kv import KINDS
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme
from qat.report.card import COLUMNS, card, converted_card, number_rows
from qat.report.tables import export_lines

FP = {"ppl": 10.0, "nll": 2.3026, "nll_se": 0.0, "tokens": 1234, "kl": 0.0, "top1_agree": 1.0}
FP |= {"bits_per_weight": 16.0, "bytes": 269_100_000, "seed": 7}
GPTQ = FP | {"ppl": 12.5, "nll": 2.5257, "nll_se": 0.0123, "kl": 0.3456, "top1_agree": 0.777}
GPTQ |= {"bits_per_weight": 5.25, "bytes": 113_200_000}
QAT = GPTQ | {"ppl": 11.25, "nll": 2.4204, "kl": 0.1234, "top1_agree": 0.876}
EXPORT = {
    "path": "x", "verified": True, "codes_equal": True, "files_changed": [], "weights_equal": True,
    "max_abs_logit_diff": 1.25e-5, "max_kl": 2e-9, "greedy_equal": True, "fast_path": None,
}  # fmt: skip
SUMMARY = {"arms": {"fp": FP, "gptq": GPTQ, "qat": QAT}, "export": EXPORT,
           "recovered": {"vs_gptq": {"kl": 0.643, "nll": None}}, "warnings": ["beware"]}  # fmt: skip
CONFIG = {
    "verb": "run", "model": {"name": "org/Some-Model"}, "format": {"name": "compressed_tensors"},
    "choices": {"recipe": "somewhere/w4.yaml", "data": "python_docs"}, "export": {"dtype": "bfloat16"},
    "calibration": {"samples": 8, "seq_len": 512}, "data": {"seq_len": 512, "path": None, "extra": []},
    "trainer": {"max_steps": 32, "batch_size": 4},
}  # fmt: skip
RUN = {
    "argv": ["/some/where/bin/qat", "run", "experiment=quickstart", "prompts=[a b]"], "device": "Some CPU",
    "data": {"path": "/some/where/tokens", "fingerprint": "f1n6e4"}, "versions": {"torch": "2.13", "qat": "0.1"},
    "git": {"sha": "abc", "dirty": True},
}  # fmt: skip
RECIPE = Recipe({"linears": Rule("(a|b)_proj", Scheme(IntGrid(4), PerGroup(64))), "h": Rule("lm_head", None)})
SERVED = {"vllm": None, "sglang": "a.q_proj [3, 5]: no kernel"}


def made(arm="qat", config=CONFIG, recipe=RECIPE, argv=()):
    return card(config, RUN, SUMMARY, arm, recipe, EXPORT, SERVED, argv)


def cells(text, arm):
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {arm} |")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_numbers_are_the_summarys():
    text = made()
    assert cells(text, "**qat**") == [
        *("**qat**", "11.250", "+1.250", "+0.1178 ± 0.0123", "0.1234", "0.876", "5.25", "113.2", "7"),
    ]
    assert cells(text, "gptq")[2:6] == ["+2.500", "+0.2231 ± 0.0123", "0.3456", "0.777"]
    assert cells(text, "fp")[:6] == ["fp", "10.000", "", "", "0.0000", "1.000"]
    assert "On 1234 held-out tokens, one seed, Some CPU." in text
    assert "- recovered against gptq: kl 64.3 %" in text
    assert "- beware" in text
    assert "recovered" not in made("gptq")


@pytest.mark.parametrize(("key", "column"), [("ppl", "ppl"), ("kl", "KL"), ("top1_agree", "top-1"), ("seed", "seed")])
def test_another_number_is_another_card(key, column):
    arms = copy.deepcopy(SUMMARY["arms"])
    arms["qat"][key] += 1
    before, after = (number_rows(a, "qat")[-1] for a in (SUMMARY["arms"], arms))
    assert before[COLUMNS.index(column)] != after[COLUMNS.index(column)]


def test_the_front_matter_is_read_by_the_hub():
    text = made()
    assert text.startswith("---\n")
    assert yaml.safe_load(text.split("---\n")[1]) == {
        "base_model": "org/Some-Model",
        "base_model_relation": "quantized",
        "pipeline_tag": "text-generation",
        "tags": ["qat", "compressed_tensors"],
    }


def test_what_it_is_and_how_it_was_made():
    text = made()
    for words in (
        *(
            "# org/Some-Model, quantized: w4 by qat",
            r"| linears | `(a\|b)_proj` | int4_g64 |  |",
            "| h | `lm_head` | left",
        ),
        *("`f1n6e4`", "Calibration: 8 x 512 tokens of the train split; training: 32 steps, batches of 4 x 512"),
        *("qat run experiment=quickstart 'prompts=[a b]'\n", "torch 2.13, qat 0.1. Commit abc with changes."),
        *("vLLM: `vllm serve --config serve/vllm.yaml` or `python serve/ray_serve.py`", "SGLang: not served. a.q_proj"),
    ):
        assert words in text, words
    assert "/some/where" not in text
    assert all(line in text for line in export_lines(EXPORT))
    for other in ({"config": CONFIG | {"verb": "ptq"}}, {"arm": "gptq"}):  # it was not trained
        assert "training" not in made(**other).split("## Data")[1].split("##")[0]
    assert "Keys and values are cached as int8" in made(recipe=Recipe(RECIPE.rules, KINDS["int8"]))
    data = {"seq_len": 512, "path": "/some/where/mine", "extra": ["/else/more"]}
    assert "`mine`, trained on `more` too; tokens with the fingerprint" in made(config=CONFIG | {"data": data})
    assert "`python_docs`; tokens with the fingerprint" in text
    both = made(argv=["qat", "export", "arm=gptq"])
    assert "'prompts=[a b]'\nqat export arm=gptq\n" in both


@pytest.mark.parametrize(("sha", "words"), [("5ha", "has the SHA-256 `5ha`"), (None, "which had no certificate")])
def test_a_conversion_says_where_it_is_from_and_claims_no_number(sha, words):
    certificate = {"model": "m", "converted_from": {"format": "gptq", "certificate": sha}, "versions": {"qat": "0.1"}}
    text = converted_card(certificate, ["qat", "export", "from=a", "format=awq"], RECIPE, "awq", EXPORT, SERVED)
    assert "Converted from a checkpoint in the format gptq, wh" in text
    assert words in text
    assert "qat export from=a format=awq" in text
    assert "ppl" not in text
    assert yaml.safe_load(text.split("---\n")[1])["base_model"] == "m"
