import subprocess
import sys

import pytest

from qat.cli import usage
from qat.cli.tree import Tree
from qat.cli.verbs import VERBS


def test_overview_lists_every_verb():
    text = usage.overview()
    assert all(f"  {verb.name} " in text and verb.help in text for verb in VERBS.values())


def test_a_verb_with_a_config_lists_groups_options_keys_and_examples(tree, run):
    text = usage.of_verb(run, tree)
    assert "model            hub [small]" in text
    assert "method@arms.sgd  [sgd]" in text
    assert "calibration  {samples: 8, seq_len: 16}" in text
    assert "examples:\n  qat run" in text


@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_every_verb_has_help_on_the_packaged_configs(verb):
    text = usage.of_verb(verb, Tree.of([]))
    assert verb.detail in text
    assert all(example in text for example in verb.examples)
    assert ("groups (" in text) == bool(verb.primary and Tree.of([]).slots(verb.primary))


@pytest.mark.parametrize("argv", [["--help"], ["run", "--help"]])
def test_help_needs_neither_hydra_nor_torch(argv):
    code = (
        "import sys; from qat.cli.main import main; status = main(sys.argv[1:]); "
        "heavy = {'torch', 'hydra', 'omegaconf', 'transformers', 'pytorch_lightning'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(status)"
    )
    assert subprocess.run([sys.executable, "-c", code, *argv], capture_output=True, check=False).returncode == 0
