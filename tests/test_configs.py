"""Law (k): every config composes, resolves and binds."""

import inspect
import os
from collections.abc import Iterator
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import Any

import hydra_memo
import pytest
import yaml
from hydra._internal import config_repository, defaults_list
from hydra.utils import get_object
from omegaconf import open_dict

from qat.cli.compose import compose, plain
from qat.cli.devices import check_choices
from qat.cli.overrides import Overrides
from qat.cli.targets import WORDS
from qat.cli.tree import GLOBAL_GROUPS, GLOBAL_HEADER, Slot, Tree, comment
from qat.cli.validate import validate
from qat.cli.verbs import VERBS

TREE = Tree.of([])
ROOT = TREE.roots[0]
FILES = sorted(ROOT.rglob("*.yaml"))
PRIMARIES = sorted({verb.primary for verb in VERBS.values() if verb.primary})
DIFFS = [f"{group}={option}" for group in GLOBAL_GROUPS for option in TREE.options(group)]


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def targets(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield node
        for child in node.values():
            yield from targets(child)
    elif isinstance(node, list):
        for child in node:
            yield from targets(child)


def bind(node: dict[str, Any], partial: bool) -> None:
    """Binds a node's arguments to what its `_target_` really is."""
    signature = inspect.signature(get_object(node["_target_"]))
    arguments = {key: value for key, value in node.items() if key not in WORDS}
    (signature.bind_partial if partial else signature.bind)(**arguments)


@cache
def slots(primary: str) -> list[Slot]:
    return TREE.slots(primary)


def rounds() -> Iterator[tuple[str, list[str]]]:
    """For each primary, sets of choices in which every option of every group of its own comes up."""
    for primary in PRIMARIES:
        groups = [slot for slot in slots(primary) if slot.group not in GLOBAL_GROUPS]
        columns = [[f"{slot.key}={option}" for option in TREE.options(slot.group)] for slot in groups]
        for row in list(zip_longest(*columns)) or [()]:
            yield primary, [choice for choice in row if choice]


ROUNDS = list(rounds())


@pytest.mark.parametrize("path", FILES, ids=name)
def test_targets_resolve_and_take_their_arguments(path):
    for node in targets(yaml.safe_load(path.read_text())):
        bind(node, partial=True)  # a file may be completed by the ones that extend it


@pytest.mark.parametrize(("primary", "choices"), ROUNDS, ids=[f"{p}-{i}" for i, (p, _) in enumerate(ROUNDS)])
def test_every_option_composes_and_binds_with_every_primary_that_has_its_group(primary, choices):
    config, problems = plain(compose(primary, Overrides(choices), TREE))
    assert problems == []
    assert {f"{key}={config['choices'][key]}" for key in (choice.split("=")[0] for choice in choices)} == set(choices)
    assert list(check_choices(config)) == []
    for node in targets(config):
        bind(node, partial=node.get("_partial_", False))


@pytest.mark.parametrize("verb", [verb for verb in VERBS.values() if verb.primary], ids=lambda verb: verb.name)
def test_what_is_packaged_is_valid(verb):
    diffs = [diff for diff in DIFFS if any(slot.key == diff.split("=")[0] for slot in slots(verb.primary))]
    for texts in ([], *([diff] for diff in diffs)):
        assert [str(problem) for problem in validate(verb, texts, TREE, files=False)[1]] == [], texts


def test_what_tests_remember_of_hydras_files_is_what_hydra_reads(monkeypatch, tmp_path):
    """Though what was composed is changed, a file of a test's own is written anew, and defaults refer to choices."""
    (tmp_path / "format").mkdir()

    def composed(number):
        text = f"defaults:\n- none\n- /experiment@other: ${{experiment}}\nnumber: {number}\n"
        (tmp_path / "format" / "mine.yaml").write_text(text)
        os.utime(tmp_path / "format" / "mine.yaml", ns=(number, number))
        tree = Tree.of([str(tmp_path)])
        return [compose(primary, Overrides(["format=mine", "experiment=smoke"]), tree) for primary in ("run", "train")]

    for config in composed(1):
        with open_dict(config):
            config.seed = 99
            config.format.clear()
    found = [plain(config)[0] for config in composed(2)]
    monkeypatch.setattr(config_repository.ConfigRepository, "load_config", hydra_memo.LOAD)
    monkeypatch.setattr(defaults_list, "_create_interpolation_map", hydra_memo.COLLECT)
    assert found == [plain(config)[0] for config in composed(2)]
    assert found[0]["format"]["number"] == 2
    assert found[0] != found[1]


@pytest.mark.parametrize("group", GLOBAL_GROUPS)
def test_diffs_of_the_whole_config_say_so(group):
    """Without the header such a file composes, and changes nothing."""
    for path in TREE.options(group).values():
        assert path.read_text().startswith(f"{GLOBAL_HEADER}\n"), path


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_file_says_what_it_is(path):
    assert comment(path) or path.name == "default.yaml" or path.parent == ROOT


@pytest.mark.parametrize("primary", PRIMARIES)
def test_self_comes_first_and_the_diffs_last(primary):
    """So that the options win over the primary, and an experiment over both."""
    for path in [ROOT / f"{primary}.yaml", ROOT / "base.yaml"]:
        entries = yaml.safe_load(path.read_text())["defaults"]
        before = entries[: entries.index("_self_")]
        assert before in ([], ["base"])
        keys = [next(iter(entry)) for entry in entries if isinstance(entry, dict)]
        assert [key in GLOBAL_GROUPS for key in keys] == sorted(key in GLOBAL_GROUPS for key in keys)


def test_every_group_is_used_by_a_primary():
    used = {slot.group for primary in PRIMARIES for slot in slots(primary)}
    assert set(TREE.groups()) == used
