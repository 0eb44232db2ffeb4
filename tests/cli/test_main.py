import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from qat.cli.main import main, positional, split_options
from qat.cli.problem import ConfigError
from qat.cli.verbs import VERBS


@pytest.fixture
def verb(monkeypatch, packaged):
    """Stands in for a verb's module, on small configs; returns what it was called with."""
    calls: list = []

    def install(name, status=0):
        module = ModuleType(f"qat.cli.{name}")
        module.main = lambda argument: calls.append(argument) or status
        monkeypatch.setitem(sys.modules, f"qat.cli.{name}", module)
        return calls

    monkeypatch.setattr("qat.cli.tree.config_dir", lambda: packaged)
    return install


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help(argv, capsys):
    assert main(argv) == 0
    assert "usage: qat VERB" in capsys.readouterr().out


def test_help_of_a_verb_wins_over_its_arguments(capsys):
    assert main(["run", "nonsense", "--help"]) == 0
    assert "usage: qat run" in capsys.readouterr().out


def test_version(capsys):
    import qat

    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"qat {qat.__version__}\n"


def test_an_unknown_verb(capsys):
    assert main(["trian"]) == 2
    assert "no verb 'trian'; did you mean train?" in capsys.readouterr().err


def test_a_verb_gets_a_plain_config_and_its_status_is_the_exit_status(verb):
    calls = verb("run", status=1)
    assert main(["run", "recipe=w3", "experiment=quick"]) == 1
    (config,) = calls
    assert type(config) is dict
    assert config["verb"] == "run"
    assert config["trainer"]["max_steps"] == {"cpu": 2, "cuda": 4}
    assert config["choices"]["experiment"] == "quick"


def test_a_wrong_config_does_not_reach_the_verb(verb, capsys):
    calls = verb("run")
    assert main(["run", "recipe=w9", "trainer.max_stpes=3"]) == 2
    assert calls == []
    assert capsys.readouterr().err.startswith("qat run: 2 problems\n  recipe=w9: ")


def test_a_verb_that_fails(verb, capsys):
    verb("run")
    sys.modules["qat.cli.run"].main = lambda config: int("x")  # type: ignore[attr-defined]
    assert main(["run"]) == 1
    assert capsys.readouterr().err == "qat run: invalid literal for int() with base 10: 'x'\n"


def test_plain_arguments_go_through(verb):
    calls = verb("compare", status=1)
    assert main(["compare", "a", "b", "--md"]) == 1
    assert calls == [["a", "b", "--md"]]


def test_user_configs_and_the_warning_about_a_hidden_one(verb, user, capsys):
    calls = verb("run")
    theirs = user(model__tiny="name: tiny\npath: null\n", model__small="name: mine\npath: null\n")
    assert main(["run", "--config-dir", str(theirs), "model=tiny"]) == 0
    assert calls[0]["model"]["name"] == "tiny"
    assert f"warning: {theirs}/model/small.yaml is hidden" in capsys.readouterr().err
    assert main(["run", f"--config-dir={theirs}/nothing"]) == 2
    assert "no such directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--config-dir"], "--config-dir: needs a directory"),
        (["--config-dri", "x"], "--config-dri: no such option; did you mean --config-dir?"),
        (["-m"], "-m: no such option"),
    ],
)
def test_options(argv, words):
    with pytest.raises(ConfigError) as caught:
        split_options(argv)
    assert words in str(caught.value)
    assert split_options(["a=1", "--config-dir", "x", "--config-dir=y"]) == (["x", "y"], ["a=1"])


def test_a_bare_directory_is_the_path(tmp_path):
    odd = tmp_path / "a=b, c"
    odd.mkdir()
    verify = VERBS["verify"]
    assert positional(verify, ["some/dir", "device=cpu"]) == ["path='some/dir'", "device=cpu"]
    assert positional(verify, [str(odd)]) == [f"path='{odd}'"]
    assert positional(verify, ["device=cpu"]) == ["device=cpu"]
    assert positional(VERBS["run"], ["some/dir"]) == ["some/dir"]
    for texts in (["a", "b"], ["a", "path=b"]):
        with pytest.raises(ConfigError, match="takes one directory"):
            positional(verify, texts)


@pytest.mark.parametrize("name", ["verify", "eval", "serve", "chat"])
def test_verbs_that_read_a_checkpoint_take_a_bare_directory(name, verb, monkeypatch):
    calls = verb(name)
    monkeypatch.setattr("qat.cli.validate.validate", lambda verb, texts, tree: ({"texts": texts}, []))
    assert main([name, "some/dir", "seed=3"]) == 0
    assert calls == [{"texts": ["path='some/dir'", "seed=3"]}]


def test_a_bare_source_tree_is_enough():
    root = Path(__file__).parents[2]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-m", "qat", "configs", "ls", "model"]
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "smollm2" in result.stdout


def test_a_run_directory_stands_for_its_export(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    assert positional(VERBS["verify"], [str(tmp_path)]) == [f"run='{tmp_path}'"]
    (tmp_path / "run.json").unlink()
    assert positional(VERBS["verify"], [str(tmp_path)]) == [f"path='{tmp_path}'"]
