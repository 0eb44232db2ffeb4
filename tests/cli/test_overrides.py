from pathlib import Path

import pytest

from qat.cli.compose import compose
from qat.cli.overrides import Overrides, quoted, sort_overrides


def problems(verb, tree, *texts):
    return [str(problem) for problem in sort_overrides(verb, list(texts), tree).problems]


def test_choices_values_and_removals_are_sorted(run, tree):
    found = sort_overrides(run, ["recipe=w3", "seed=2", "+new.key=3", "~arms.sgd", "method@arms.b=sgd"], tree)
    assert found == Overrides(["recipe=w3", "++seed=2", "++new.key=3", "+method@arms.b=sgd"], ["arms.sgd"], [])


def test_a_plus_is_neither_needed_nor_wrong(run, tree):
    assert sort_overrides(run, ["+recipe=w3"], tree).lines == ["recipe=w3"]
    assert sort_overrides(run, ["++seed=1", "+seed=2"], tree).lines == ["++seed=1", "++seed=2"]


def test_a_group_without_a_default_can_be_chosen_and_left_alone(run, tree):
    assert "kv" not in compose("run", Overrides(), tree).recipe
    for text in ("kv=null", "~kv"):
        found = sort_overrides(run, [text], tree)
        assert found.problems == []
        assert "kv" not in compose("run", found, tree).recipe
    assert compose("run", sort_overrides(run, ["kv=int8"], tree), tree).recipe.kv.grid.bits == 8


def test_a_slot_that_the_experiment_adds_is_overridden_not_added(run, tree):
    found = sort_overrides(run, ["method@arms.more=sgd", "experiment=more"], tree)
    assert found.lines == ["method@arms.more=sgd", "experiment=more"]
    assert "more" in compose("run", found, tree).arms


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("nonsense", "nonsense: is no override"),
        ("a=[1", "a=[1: does not parse"),
        ("seed=1,2", "a sweep over values"),
        ("verb=train", "verb: is set by the command"),
        ("hydra.run.dir=x", "hydra.run.dir: Hydra's own settings"),
        ("hydra/launcher=x", "hydra/launcher: Hydra's own settings"),
        ("model/x=y", "model/x: no such group"),
        ("recipe=w33", "recipe=w33: no such option; did you mean w3?"),
        ("recipe=null", "recipe: needs an option (there are: w3, w4)"),
        ("method@arms.x=sdg", "method@arms.x=sdg: no such option; did you mean sgd?"),
        ("experiment=[quick,slow]", "experiment=slow: no such option"),
        ("recip@x=w3", "recip@x: no such group; did you mean recipe?"),
        ("method=sgd", "method: qat run has no group of this name; write method@arms.NAME=sgd"),
        ("~method@arms.x", "~method@arms.x: not there; did you mean method@arms.sgd?"),
        ("~recipe", "~recipe: qat run needs it"),
    ],
)
def test_what_cannot_be_used_is_said(run, tree, text, words):
    (problem,) = problems(run, tree, text)
    assert words in problem


def test_a_group_of_another_verb_is_refused_with_those_of_this_one(look, tree):
    assert problems(look, tree, "recipe=w3") == ["recipe: qat look has no group of this name; its groups are: none"]


def test_a_choice_is_made_once(run, tree):
    assert problems(run, tree, "recipe=w3", "recipe=w4") == ["recipe: given twice"]


def test_all_problems_at_once_and_the_rest_still_composes(run, tree):
    found = sort_overrides(run, ["nonsense", "recipe=w5", "seed=3"], tree)
    assert len(found.problems) == 2
    assert compose("run", found, tree).seed == 3


def test_an_option_may_be_a_file(run, tree, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mixed_3.25.yaml").write_text("a: 1\n")
    found = sort_overrides(run, ["recipe=mixed_3.25.yaml"], tree)
    assert found.problems == []
    assert found.lines == ["recipe='mixed_3.25'"]
    assert found.files == {"recipe/mixed_3.25": Path("mixed_3.25.yaml")}


def test_a_file_never_takes_the_name_of_another_option(run, tree, tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "sgd.yaml").write_text("lr: 1\n")
    texts = [f"method@arms.{folder}={tmp_path}/{folder}/sgd.yaml" for folder in ("a", "b")]
    found = sort_overrides(run, texts, tree)
    assert found.lines == ["+method@arms.a='my_sgd'", "+method@arms.b='my_my_sgd'"]
    assert found.files == {"method/my_sgd": tmp_path / "a/sgd.yaml", "method/my_my_sgd": tmp_path / "b/sgd.yaml"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("recipe=./w4.yaml", "recipe=./w4.yaml: no such file"),
        ("recipe=/nowhere/w4.yaml", "recipe=/nowhere/w4.yaml: no such file"),
        ("recipe=w3.yaml", "recipe=w3.yaml: no such option (there are: w3, w4)"),
        ("experiment=./quick.yaml", "experiment=./quick.yaml: no such option"),
    ],
)
def test_a_file_that_is_not_there_or_cannot_be_one(run, tree, text, words):
    (problem,) = problems(run, tree, text)
    assert problem.startswith(words)


def test_a_file_that_is_no_mapping(run, tree, tmp_path):
    (tmp_path / "x.yaml").write_text("- 1\n")
    (problem,) = problems(run, tree, f"recipe={tmp_path}/x.yaml")
    assert problem.endswith("expected a mapping, found list")


@pytest.mark.parametrize("text", ["/a b/c", "it's", "a,b=c", "x\\", "\\'", "$no", "[1", "'quoted'"])
def test_quoted_text_arrives_as_it_is(look, tree, text):
    from omegaconf import OmegaConf

    found = sort_overrides(look, [f"path={quoted(text)}"], tree)
    config = compose("look", found, tree)
    assert OmegaConf.to_container(config, resolve=False)["path"] == text
