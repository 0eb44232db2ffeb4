import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from qat.cli.problem import ConfigError
from qat.cli.tree import Slot, Tree, comment, config_dir, read_yaml


def test_packaged_configs_lie_beside_a_source_tree_or_in_the_package():
    assert (config_dir() / "run.yaml").is_file()


def test_an_installed_package_brings_its_configs(tmp_path):
    package = Path(__file__).parents[2] / "qat"
    shutil.copytree(package, tmp_path / "qat", ignore=shutil.ignore_patterns("__pycache__"))
    if not (package / "configs").exists():
        shutil.copytree(package.parent / "configs", tmp_path / "qat/configs")
    command = [sys.executable, "-m", "qat", "configs", "ls", "model"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "smollm2" in result.stdout


def test_groups_and_options(tree):
    assert tree.groups() == [
        "callbacks",
        "debug",
        "experiment",
        "kv",
        "logger",
        "method",
        "model",
        "optim",
        "recipe",
        "trainer",
    ]
    assert list(tree.options("recipe")) == ["w3", "w4"]


def test_comment_skips_hydras_header(packaged):
    assert comment(packaged / "experiment/quick.yaml") == "Short."
    assert comment(packaged / "trainer/auto.yaml") == ""


def test_slots_include_what_a_primary_extends(tree):
    slots = tree.slots("run")
    assert slots[0] == Slot("model", "model", "small")
    assert [slot.key for slot in slots][-3:] == ["method@arms.sgd", "experiment", "debug"]
    assert tree.slots("experiment/more") == [Slot("method", "arms.more", "sgd")]


def test_a_header_names_the_place_that_options_fill(tree):
    places = {slot.key: tree.target(slot) for slot in tree.slots("run")}
    assert places["kv"] == "recipe.kv"
    assert (places["recipe"], places["method@arms.sgd"]) == ("recipe", "arms.sgd")


def test_bases_come_first_and_without_defaults(tree):
    contents = tree.bases("recipe/w3")
    assert [("_target_" in content, "defaults" in content) for content in contents] == [(True, False), (False, False)]


def test_an_option_can_take_in_an_option_of_another_group(user, tree):
    both = Tree((*tree.roots, user(model__start="# With a method.\ndefaults:\n  - /method@method: sgd\nname: a\n")))
    taken, own = both.bases("model/start")
    assert taken == {"method": {"_target_": "torch.optim.SGD", "_partial_": True, "lr": {"cpu": 0.1, "cuda": 0.2}}}
    assert own == {"name": "a"}


def test_numbers_are_read_as_omegaconf_reads_them(packaged):
    assert read_yaml(packaged / "optim/adamw.yaml")["lr"] == 1e-4


def test_user_directories_come_after_the_packaged_one(tree, user):
    theirs = user(model__small="name: mine\n", model__tiny="name: tiny\n")
    both = Tree((*tree.roots, theirs))
    assert list(both.options("model")) == ["hub", "small", "tiny"]
    assert both.options("model")["small"] == tree.roots[0] / "model/small.yaml"
    assert both.find("model/small") == tree.roots[0] / "model/small.yaml"
    assert both.clashes() == [theirs / "model/small.yaml"]
    assert tree.clashes() == []


def test_a_directory_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ConfigError, match="no such directory"):
        Tree.of([str(tmp_path / "nothing")])


def test_an_unknown_option_names_the_nearest(tree):
    with pytest.raises(
        ConfigError, match=r"model=smal: no such option; did you mean small\? \(there are: hub, small\)"
    ):
        tree.require("model", "smal")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("a: [\n", "not readable as YAML"),
        ("- a\n", "expected a mapping"),
        ("defaults: a\n", "defaults: expected a list"),
    ],
)
def test_a_broken_file_is_named(user, tree, content, words):
    both = Tree((*tree.roots, user(model__broken=content)))
    with pytest.raises(ConfigError, match=words) as caught:
        both.bases("model/broken")
    assert "broken.yaml" in caught.value.problems[0].where


def test_a_base_that_does_not_exist_is_named(user, tree):
    both = Tree((*tree.roots, user(model__child="defaults:\n  - parent\n")))
    with pytest.raises(ConfigError, match="model/parent"):
        both.bases("model/child")
