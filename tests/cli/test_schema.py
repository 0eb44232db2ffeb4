import copy
import shutil

import pytest

from qat.cli.compose import compose, plain
from qat.cli.devices import by_device
from qat.cli.fields import at
from qat.cli.overrides import Overrides
from qat.cli.schema import build_schema, check_schema
from qat.cli.tree import Tree


@pytest.fixture(scope="module")
def schema(run, tree):
    return build_schema(run, tree)


@pytest.fixture(scope="module")
def config(tree):
    return by_device(plain(compose("run", Overrides(), tree))[0], "cpu")


def changed(config, place, **keys):
    config = copy.deepcopy(config)
    (at(config, place) if place else config).update(keys)
    return config


def said(config, schema):
    return [str(problem) for problem in check_schema(config, schema)]


def test_the_packaged_config_fits(config, schema):
    assert said(config, schema) == []


@pytest.mark.parametrize(
    ("place", "keys", "problem"),
    [
        ("trainer", {"max_stpes": 3}, "trainer.max_stpes: no such key; did you mean max_steps?"),
        ("trainer", {"zzz": 3}, "trainer.zzz: no such key (trainer has: max_steps, clip, compile, lightning)"),
        ("", {"max_steps": 3}, "max_steps: no such key; did you mean trainer.max_steps?"),
        ("", {"lr": 3}, "lr: no such key; did you mean arms.sgd.lr?"),
        ("", {"experiment": {}}, "experiment: no such key; a file in the group experiment starts with the line "),
        ("data", {"more": 3}, "data.more: no such key (data has: path, seq_len)"),
        (
            "logger",
            {"wandb": {"project": "p", "mode": "auto", "tags": "a"}},
            "logger.wandb.tags: expected a list, found 'a'",
        ),
        ("trainer", {"compile": "yes"}, "trainer.compile: expected true or false, found 'yes'"),
        ("", {"calibration": 5}, "calibration: expected a mapping with samples, seq_len; found 5"),
        ("", {"calibration": {"samples": 1}}, "calibration.seq_len: is missing; give it: calibration.seq_len=..."),
        ("", {"optim": 3}, "optim: expected a mapping with _target_, found 3"),
        ("", {"optim": {"lr": 3}}, 'optim: expected a mapping with _target_, found {"lr": 3}'),
        ("", {"calibration": {"_target_": "x"}}, "calibration: takes no _target_"),
        ("", {"arms": 3}, "arms: expected a mapping of names to targets, found 3"),
        ("arms", {"x": {"lr": 1}}, 'arms.x: expected a mapping with _target_, found {"lr": 1}'),
        ("logger", {"wandb": "on"}, "logger.wandb: expected a mapping with project, mode, tags; found 'on'"),
        ("model", {"name": "???"}, "model.name: has no value; give it: model.name=..."),
    ],
)
def test_what_does_not_fit_is_said(config, schema, place, keys, problem):
    (text,) = said(changed(config, place, **keys), schema)
    assert text.startswith(problem)


@pytest.mark.parametrize(
    ("place", "keys"),
    [
        ("logger", {"wandb": None}),  # another option's default
        ("trainer", {"lightning": {"anything": 1}}),  # a signature's business
        ("callbacks", {"mine": {"_target_": "a.b"}}),
        ("arms", {"x": {"_target_": "a.b", "whatever": 1}}),
        ("recipe", {"whatever": 1}),
        ("trainer", {"max_steps": {"cpu": 3}}),  # half a choice: reported as such
        ("model", {"path": "a"}),
    ],
)
def test_what_another_check_decides_passes(config, schema, place, keys):
    assert said(changed(config, place, **keys), schema) == []


def test_an_option_may_build_nothing(run, tree, user):
    """And with it chosen, its group takes no other keys."""
    both = Tree((*tree.roots, user(optim__none="# Nothing.\n{}\n")))
    packaged = Tree((both.roots[1] / "packaged",))
    shutil.copytree(tree.roots[0], packaged.roots[0])
    shutil.copy(both.find("optim/none"), packaged.roots[0] / "optim/none.yaml")
    schema = build_schema(run, packaged)
    config = by_device(plain(compose("run", Overrides(["optim=none"]), packaged))[0], "cpu")
    assert said(config, schema) == []
    assert said(changed(config, "optim", lr=3), schema) == ['optim: expected a mapping with _target_, found {"lr": 3}']
    assert said(changed(config, "", optim=None), schema) == ["optim: expected a mapping with _target_, found null"]


def test_a_user_option_is_held_to_the_packaged_ones(run, tree, user):
    both = Tree((*tree.roots, user(model__mine="nam: x\npath: null\n")))
    config = by_device(plain(compose("run", Overrides(["model=mine"]), both))[0], "cpu")
    assert said(config, build_schema(run, both)) == [
        "model.nam: no such key; did you mean name?",
        "model.name: is missing; give it: model.name=...",
    ]


def test_an_option_that_extends_another_has_its_keys(run, packaged, tmp_path):
    shutil.copytree(packaged, tmp_path / "configs")
    (tmp_path / "configs/model/child.yaml").write_text("defaults:\n  - small\n  - _self_\nname: child\n")
    both = Tree((tmp_path / "configs",))
    assert (
        said(by_device(plain(compose("run", Overrides(["model=child"]), both))[0], "cpu"), build_schema(run, both))
        == []
    )
    broken = changed(plain(compose("run", Overrides(), both))[0], "", model={"name": "x"})
    assert "model.path: is missing" in said(by_device(broken, "cpu"), build_schema(run, both))[0]
