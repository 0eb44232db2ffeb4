import subprocess
import sys
import time

import pytest

from qat.cli.tree import Tree
from qat.cli.validate import validate
from qat.cli.verbs import Verb


def said(verb, tree, *texts, files=True):
    return [str(problem) for problem in validate(verb, list(texts), tree, files)[1]]


def test_a_good_config_is_plain_and_keeps_its_choices(run, tree):
    config, problems = validate(run, ["experiment=quick", "optim.weight_decay=0.1", "recipe=w3"], tree)
    assert problems == []
    assert config["trainer"]["max_steps"] == {"cpu": 2, "cuda": 4}
    assert config["optim"]["weight_decay"] == 0.1  # in the signature, not in the YAML: no plus needed
    assert config["verb"] == "run"


def test_the_verb_is_the_one_that_was_called(tree):
    verb = Verb("chat", "help", "detail", ("", ""), "look")
    assert validate(verb, [], tree)[0]["verb"] == "chat"


def test_every_kind_of_problem_at_once(run, tree):
    texts = [
        *("nonsense", "recipe=w9", "trainer.max_stpes=3", "optim.lrr=3", "~arms.x", "model=hub", "seed=${nothing}"),
        *("recipe.rules.linears.weight.grid.bits=12", "calibration.samples={cpu:0,cuda:-1}", "device=gpu"),
        *("data.seq_len={cpu:3}", "trainer.clip=a", "++callbacks.c._target_=nowhere.X", "data.path=/nowhere/at/all"),
    ]
    found = said(run, tree, *texts)
    expected = [
        *("nonsense:", "recipe=w9:", "~arms.x:", "seed:", "data.seq_len: names cpu alone", "trainer.max_stpes:"),
        *(
            "trainer.clip: expected a finite number above 0 or null",
            "model.name: has no value",
            "callbacks.c._target_:",
            "optim.lrr:",
        ),
        *("device:", "calibration.samples: expected an integer of at least 1, found 0"),
        *("recipe.rules.linears.weight.grid: bits=12", "data.path:"),
        "calibration.samples: expected an integer of at least 1, found -1",  # the other device
    ]
    assert len(found) == len(expected)
    for start in expected:
        assert any(text.startswith(start) for text in found), (start, found)


def test_a_config_that_does_not_compose_is_empty(run, tree, user):
    both = Tree((*tree.roots, user(experiment__broken="# @package _global_\ndefaults:\n  - override /recipe: w9\n")))
    config, problems = validate(run, ["experiment=broken", "nonsense"], both)
    assert config == {}
    assert len(problems) == 2


def test_files_are_left_alone_if_asked(run, tree):
    assert said(run, tree, "model.path=/nowhere", files=False) == []
    assert said(run, tree, "model.path=/nowhere") != []


def test_removing_what_can_be_spared_and_what_cannot(run, tree):
    assert said(run, tree, "~arms.sgd", "~optim.betas") == []
    assert said(run, tree, "~trainer.max_steps") == ["trainer.max_steps: is missing; give it: trainer.max_steps=..."]


def test_a_choice_by_device_may_be_set_and_unset(run, tree):
    assert said(run, tree, "experiment=quick", "trainer.max_steps=7") == []
    assert said(run, tree, "trainer.max_steps={cpu:7,cuda:8}", "optim.lr={cpu:1e-3,cuda:1e-4}") == []
    assert said(run, tree, "optim.lr={cpu:1e-3,cuda:x}") == ["optim.lr: expected a finite number above 0, found 'x'"]


@pytest.mark.parametrize("texts", [["trainer.max_stpes=3", "recipe=w9"], ["recipe.rules.linears.weight.grid.bits=9"]])
def test_the_packaged_configs_are_checked_without_torch(texts):
    code = (
        "import sys; from qat.cli.main import main; status = main(['run', *sys.argv[1:]]); "
        "heavy = {'torch', 'pytorch_lightning', 'transformers', 'datasets', 'wandb'} & set(sys.modules); "
        "assert not heavy, heavy; sys.exit(status)"
    )
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code, *texts], capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    assert result.returncode == 2, result.stderr
    assert all(text.split("=")[0] in result.stderr for text in texts if "bits" not in text)
    assert "Traceback" not in result.stderr
    assert seconds < 6  # about 1 on an idle core
