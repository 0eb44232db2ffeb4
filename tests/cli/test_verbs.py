import pytest

from qat.cli.overrides import sort_overrides
from qat.cli.tree import Tree
from qat.cli.verbs import VERBS


def test_every_word_is_there():
    assert list(VERBS) == [
        "run",
        "train",
        "ptq",
        "sensitivity",
        "eval",
        "export",
        "verify",
        "serve",
        "chat",
        "compare",
        "generate",
        "configs",
        "env",
    ]


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_a_verb_has_one_line_two_examples_and_its_primary(verb):
    assert "\n" not in verb.help
    assert all(example.startswith(f"qat {verb.name}") for example in verb.examples)
    assert verb.primary is None or Tree.of([]).find(verb.primary)


@pytest.mark.parametrize("verb", [verb for verb in VERBS.values() if verb.primary], ids=lambda verb: verb.name)
def test_examples_name_groups_and_options_that_exist(verb):
    for example in verb.examples:
        texts = [word.strip("'") for word in example.split()[2:] if "=" in word or "~" in word]
        assert sort_overrides(verb, texts, Tree.of([])).problems == []
