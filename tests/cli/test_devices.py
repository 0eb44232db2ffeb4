import copy

import pytest

from qat.cli.devices import by_device, check_choices, is_choice

CONFIG = {"a": {"cpu": 1, "cuda": {"x": 2}}, "b": [{"cpu": 3, "cuda": 4}], "c": {"cpu": 5, "gpu": 6}, "d": {"cpu": 7}}


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("cpu", {"a": 1, "b": [3], "c": {"cpu": 5, "gpu": 6}, "d": {"cpu": 7}}),
        ("cuda", {"a": {"x": 2}, "b": [4], "c": {"cpu": 5, "gpu": 6}, "d": {"cpu": 7}}),
    ],
)
def test_choices_are_made_and_the_config_stays(device, expected):
    before = copy.deepcopy(CONFIG)
    assert by_device(CONFIG, device) == expected
    assert before == CONFIG


def test_made_choices_stay_made():
    once = by_device(CONFIG, "cuda")
    assert by_device(once, "cpu") == once


def test_an_unknown_device_type_is_our_mistake():
    with pytest.raises(AssertionError):
        by_device(CONFIG, "cuda:0")


def test_half_a_choice_is_a_problem():
    assert is_choice({"cpu": 1})
    assert not is_choice({})
    (problem,) = check_choices({"a": {"b": {"cuda": 3}}, "c": {"cpu": 1, "cuda": 2}})
    assert problem.where == "a.b"
    assert "names cuda alone" in problem.text
