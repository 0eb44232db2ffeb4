import pytest

from qat.cli.exporting import FORMATS, outcome
from qat.cli.main import main

CHECKS = {
    "tensors": {"passed": True},
    "compressed_tensors": {"passed": True},
    "transformers_default": {"passed": True},
    "engine": {"max_abs_logit_diff": 1e-6, "greedy_equal": 3, "prompts": 3, "passed": True},
    "fast_path": {"kl": 1e-5},
}


def test_a_certificate_in_the_words_of_the_summary():
    assert outcome("somewhere", {"verified": True, "checks": CHECKS}) == {
        "path": "somewhere",
        "verified": True,
        "codes_equal": True,
        "weights_equal": True,
        "max_abs_logit_diff": 1e-6,
        "greedy_equal": True,
        "fast_path": {"kl": 1e-5},
    }


@pytest.mark.parametrize("name", ["compressed_tensors", "transformers_default"])
def test_one_loader_that_disagrees_is_enough(name):
    checks = CHECKS | {name: {"passed": False}}
    assert not outcome("x", {"verified": False, "checks": checks})["weights_equal"]


def test_one_prompt_that_goes_elsewhere_is_enough():
    checks = CHECKS | {"engine": CHECKS["engine"] | {"greedy_equal": 2}}
    assert outcome("x", {"verified": False, "checks": checks})["greedy_equal"] is False


def test_what_was_not_checked_is_none_and_not_equal():
    loaders = {name: CHECKS[name] for name in ("compressed_tensors", "transformers_default")}
    found = outcome("x", {"verified": False, "checks": loaders})
    unknown = ("codes_equal", "max_abs_logit_diff", "greedy_equal", "fast_path")
    assert [found[key] for key in unknown] == [None] * 4
    assert not found["verified"]


def test_every_format_option_is_a_format(capsys):
    assert main(["configs", "ls", "format"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in FORMATS)
