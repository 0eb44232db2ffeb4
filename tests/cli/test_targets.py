import ast

import pytest

from qat.cli import source
from qat.cli.targets import OURS, check_targets, refused

SCHEME = {
    "_target_": "qat.numerics.scheme.Scheme",
    "grid": {"_target_": "qat.numerics.grid.IntGrid", "bits": 4},
    "granularity": {"_target_": "qat.numerics.granularity.PerChannel"},
}


def said(config):
    return [str(problem) for problem in check_targets(config)]


def test_a_good_node_has_no_problem():
    assert said({"a": SCHEME, "b": [SCHEME], "optim": {"_target_": "torch.optim.AdamW", "_partial_": True}}) == []


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"symetric": True}, "a.symetric: no such argument; did you mean symmetric?"),
        ({"symmetric": 1}, "a.symmetric: expected true or false, found 1"),
        ({"grid": 4}, "a.grid: expected a mapping with the _target_ of a IntGrid or FloatGrid or Codebook, found 4"),
        ({"_args_": [1]}, "a._args_: not used here; arguments are given by name"),
        ({"_partail_": True}, "a._partail_: not used here; did you mean _partial_?"),
        ({"_partial_": "yes"}, "a._partial_: expected true or false"),
        (
            {"_target_": "qat.numerics.scheme.Schema"},
            "a._target_: qat.numerics.scheme.Schema does not exist: "
            "qat.numerics.scheme has no Schema; did you mean Scheme?",
        ),
    ],
)
def test_what_does_not_bind_is_said(change, problem):
    assert said({"a": SCHEME | change}) == [problem]


def test_a_missing_argument_is_asked_for_unless_partial():
    node = {"_target_": "qat.numerics.scheme.Scheme", "symmetric": True}
    assert said({"a": node}) == [
        "a.grid: has no value; give it: a.grid=...",
        "a.granularity: has no value; give it: a.granularity=...",
    ]
    assert said({"a": node | {"_partial_": True}}) == []


def test_nodes_inside_nodes_and_lists_are_seen():
    bad = {"_target_": "qat.numerics.grid.IntGrid", "bit": 4}
    assert [text.split(":")[0] for text in said({"a": SCHEME | {"grid": bad}, "b": [bad]})] == [
        *("a.grid.bit", "a.grid.bits"),
        *("b[0].bit", "b[0].bits"),
    ]


@pytest.mark.parametrize(
    ("path", "target", "allowed"),
    [
        ("optim", "torch.optim.AdamW", True),
        ("optim", "pytorch_lightning.callbacks.Timer", True),
        ("optim", "os.system", False),
        ("optim", "torch.load", False),
        ("optim", "qat", False),
        ("optim", "qat.x y", False),
        ("optim", 3, False),
        ("callbacks.mine", "mine.Callback", True),
        ("callbacks.mine", "no-name.X", False),
    ],
)
def test_only_some_packages_can_be_called(path, target, allowed):
    assert (refused(path, target) is None) == allowed


def test_a_callback_may_come_from_anywhere_that_exists():
    assert said({"callbacks": {"c": {"_target_": "nowhere.Thing"}}}) == [
        "callbacks.c._target_: nowhere.Thing does not exist: no package nowhere"
    ]
    stopping = {"_target_": "pytorch_lightning.callbacks.EarlyStopping", "monitor": "loss"}
    assert said({"callbacks": {"c": stopping}}) == []
    assert "did you mean monitor?" in said({"callbacks": {"c": stopping | {"monitr": "x"}}})[0]


def test_the_trainers_arguments_are_lightnings_and_not_ours():
    arguments = {"limit_val_batch": 3, "max_steps": 3, "deterministic": True, "num_nodes": "two"}
    assert said({"trainer": {"lightning": arguments}}) == [
        "trainer.lightning.max_steps: is decided by trainer.max_steps",
        "trainer.lightning.limit_val_batch: no such argument; did you mean limit_val_batches?",
        "trainer.lightning.num_nodes: expected an integer, found 'two'",
    ]


def test_what_is_ours_is_what_training_gives_the_trainer():
    path = source.module_file("qat.training.fit")
    assert path is not None
    calls = [node for node in ast.walk(source.module_tree(path)) if isinstance(node, ast.Call)]
    (trainer,) = [call for call in calls if ast.unparse(call.func) == "pl.Trainer"]
    assert {keyword.arg for keyword in trainer.keywords} - {None} == set(OURS)


def test_targets_that_are_not_known_yet_wait():
    assert said({"a": {"_target_": "???"}}) == []
