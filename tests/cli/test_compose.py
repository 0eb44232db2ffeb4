import pytest
from hydra.core.global_hydra import GlobalHydra

from qat.cli.compose import compose, plain, remove
from qat.cli.overrides import Overrides
from qat.cli.problem import ConfigError
from qat.cli.tree import Tree


def test_composition_is_plain_and_says_its_choices(tree, monkeypatch):
    monkeypatch.setenv("QAT_RUNS", "elsewhere")
    config, problems = plain(compose("run", Overrides(["experiment=quick", "recipe=w3"]), tree))
    assert problems == []
    assert type(config["recipe"]["rules"]["linears"]) is dict
    assert config["trainer"]["max_steps"] == {"cpu": 2, "cuda": 4}
    assert config["recipe"]["rules"]["linears"]["weight"]["grid"]["bits"] == 3
    assert config["runs"] == "elsewhere"
    assert "hydra" not in config
    assert config["choices"]["recipe"] == "w3"
    assert config["choices"]["experiment"] == "quick"
    assert config["choices"]["debug"] is None


def test_hydras_global_state_is_left_alone(tree):
    compose("run", Overrides(), tree)
    assert not GlobalHydra.instance().is_initialized()
    with pytest.raises(ConfigError):
        compose("run", Overrides(["recipe=nothing"]), tree)
    assert not GlobalHydra.instance().is_initialized()


def test_the_debug_option_has_the_last_word(tree):
    assert compose("run", Overrides(["experiment=quick", "debug=fast"]), tree).trainer.max_steps == 1


def test_user_directories_are_searched_even_with_odd_names(tree, tmp_path):
    odd = tmp_path / "my configs, mine"
    (odd / "model").mkdir(parents=True)
    (odd / "model/tiny.yaml").write_text("name: tiny\n")
    assert compose("run", Overrides(["model=tiny"]), Tree((*tree.roots, odd))).model.name == "tiny"


def test_a_file_composes_like_an_option_of_its_group(tree, tmp_path):
    """It may extend packaged options, and overrides of its keys come after it."""
    file = tmp_path / "odd name, mine.yaml"
    file.write_text("defaults:\n  - w4\n  - _self_\nrules: {linears: {weight: {grid: {bits: 2}}}}\n")
    overrides = Overrides(["recipe='odd name, mine'", "++recipe.rules.linears.match=x"])
    overrides.files["recipe/odd name, mine"] = file
    config, problems = plain(compose("run", overrides, tree))
    assert problems == []
    assert config["choices"]["recipe"] == "odd name, mine"
    linears = config["recipe"]["rules"]["linears"]
    assert (linears["weight"]["grid"]["bits"], linears["match"]) == (2, "x")
    assert linears["weight"]["granularity"]["group_size"] == 16


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("# @package _global_\ndefaults:\n  - override /recipe: w9\n", "Could not find 'recipe/w9'"),
        ("a: [\n", "broken.yaml"),
        ("# @package _global_\ntrainer: 3\nseed: ${\n", "no viable alternative"),
    ],
)
def test_hydras_errors_are_one_sentence(tree, user, content, words):
    theirs = user(experiment__broken=content)
    with pytest.raises(ConfigError) as caught:
        compose("run", Overrides(["experiment=broken"]), Tree((*tree.roots, theirs)))
    text = str(caught.value)
    assert words in text
    assert "\n" not in text
    assert "search path" not in text.lower()


def test_every_interpolation_that_fails_is_named(tree):
    config, problems = plain(compose("run", Overrides(["++seed=${nothing}", "++data.path=${nowhere.at.all}"]), tree))
    assert [problem.where for problem in problems] == ["seed", "data.path"]
    assert config["calibration"] == {"samples": 8, "seq_len": 16}


def test_missing_values_stay(tree):
    assert plain(compose("run", Overrides(["model=hub"]), tree))[0]["model"]["name"] == "???"


def test_keys_are_names(tree):
    config, _ = plain(compose("run", Overrides(["++callbacks={1:2}"]), tree))
    assert config["callbacks"] == {"1": 2}


def test_removals(tree):
    config = compose("run", Overrides(), tree)
    assert [str(problem) for problem in remove(config, ["arms.sgd", "recipe.rules.linear", "nothing"])] == [
        "~recipe.rules.linear: not there; did you mean recipe.rules.linears?",
        "~nothing: not there",
    ]
    assert config.arms == {}
