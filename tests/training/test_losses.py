"""The value that a config builds: what it counts, and what it refuses before torch is imported."""

import pytest

from qat.cli.source import is_light
from qat.cli.tree import Tree
from qat.cli.validate import validate
from qat.cli.verbs import VERBS
from qat.training.losses import Loss


def test_weights_are_the_parts_that_count():
    assert Loss().weights == {"kl": 1.0}
    assert Loss(kl=0.0, reverse_kl=0.3, jsd=2, ce=0.5).weights == {"reverse_kl": 0.3, "jsd": 2, "ce": 0.5}
    assert Loss(kl=0.0, jsd=1.0).distils
    assert Loss(kl=0.0, reverse_kl=1.0).distils
    assert not Loss(kl=0.0, ce=1.0).distils


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kl": 0.0}, r"every weight is 0 \(kl, reverse_kl, jsd, ce\)"),
        ({"kl": -1.0, "ce": 2.0}, r"kl=-1\.0: a weight is finite and not negative.*use 0"),
        ({"jsd": float("nan")}, "jsd=nan: a weight is finite"),
        ({"reverse_kl": float("inf")}, "reverse_kl=inf: a weight is finite"),
        ({"kl": 0.0, "jsd": 1.0, "beta": 0.0}, r"beta=0\.0: a share between 0 and 1, both excluded; at 0 use kl=1"),
        ({"kl": 0.0, "jsd": 1.0, "beta": 1.0}, r"beta=1\.0: .*at 1 reverse_kl=1"),
        ({"ce": -1.0, "beta": 2.0}, r"ce=-1\.0: .*; beta=2\.0: "),  # all of it at once
    ],
)
def test_what_means_nothing_is_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        Loss(**arguments)


def test_configs_are_refused_without_torch():
    assert is_light("qat.training.losses")
    overrides = ["loss=jsd", "loss.beta=1.5", "loss.reverse_kl=-1"]
    (problem,) = validate(VERBS["train"], overrides, Tree.of([]), files=False)[1]
    assert str(problem).startswith("loss: reverse_kl=-1: a weight is finite and not negative")
    assert "beta=1.5: a share between 0 and 1" in str(problem)


@pytest.mark.parametrize("name", ["kl", "reverse_kl", "jsd", "ce", "ce_kl"])
def test_each_config_is_what_it_is_called(name):
    config, problems = validate(VERBS["train"], [f"loss={name}"], Tree.of([]), files=False)
    assert problems == []
    arguments = {key: value for key, value in config["loss"].items() if key != "_target_"}
    assert set(Loss(**arguments).weights) == ({"ce", "kl"} if name == "ce_kl" else {name})
