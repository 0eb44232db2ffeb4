import pytest
import yaml

from qat.cli.main import main


@pytest.fixture(autouse=True)
def _small(monkeypatch, packaged, tmp_path):
    monkeypatch.setattr("qat.cli.tree.config_dir", lambda: packaged)
    monkeypatch.chdir(tmp_path)


def test_ls(capsys):
    assert main(["configs", "ls", "model", "recipe"]) == 0
    assert capsys.readouterr().out == (
        "model\n  hub    From the hub.\n  small  A small one.\nrecipe\n  w3  Three bits.\n  w4  Four bits.\n"
    )
    assert main(["configs"]) == 0
    assert "experiment\n  more" in capsys.readouterr().out


def test_show_is_yaml_with_the_choices_above(capsys):
    assert main(["configs", "show", "run", "experiment=quick", "recipe=w3"]) == 0
    text = capsys.readouterr().out
    assert "# recipe: w3\n" in text
    assert "# debug: null\n" in text
    config = yaml.safe_load(text)
    assert config["recipe"]["rules"]["linears"]["weight"]["grid"]["bits"] == 3
    assert "choices" not in config
    assert main(["configs", "show", "recipe=w3"]) == 0  # `run` is what one shows
    assert "bits: 3" in capsys.readouterr().out


def test_show_prints_what_there_is_of_a_wrong_config(capsys):
    assert main(["configs", "show", "run", "trainer.max_stpes=3", "model.path=/nowhere"]) == 2
    found = capsys.readouterr()
    assert "max_stpes: 3" in found.out
    assert found.err == ("qat configs show run: 1 problem\n  trainer.max_stpes: no such key; did you mean max_steps?\n")


def test_cp_and_use(capsys, tmp_path):
    assert main(["configs", "cp", "recipe/w4"]) == 0
    assert "qat run --config-dir my_configs recipe=my_w4" in capsys.readouterr().out
    copy = tmp_path / "my_configs/recipe/my_w4.yaml"
    copy.write_text(copy.read_text().replace("bits: 4", "bits: 5"))
    assert main(["configs", "show", "--config-dir", "my_configs", "run", "recipe=my_w4"]) == 0
    assert "bits: 5" in capsys.readouterr().out
    assert main(["configs", "cp", "recipe/w3", "mine/recipe/w7.yaml"]) == 0
    assert "--config-dir mine recipe=w7" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["lst"], "no such subcommand; did you mean ls?"),
        (["ls", "modle"], "no such group; did you mean model?"),
        (["show", "rnu"], "no verb with a config; did you mean run?"),
        (["show", "env"], "no verb with a config"),
        (["cp"], "takes group/option"),
        (["cp", "recipe"], "takes group/option"),
        (["cp", "model/smal"], "did you mean small?"),
        (["cp", "model/small", "there/small.yaml"], "the folder of an option is its group"),
        (["cp", "model/small", "there/model/hub.yaml"], "a packaged option has this name"),
    ],
)
def test_usage(argv, words, capsys):
    assert main(["configs", *argv]) == 2
    assert words in capsys.readouterr().err


def test_cp_overwrites_nothing(capsys):
    assert main(["configs", "cp", "recipe/w4"]) == 0
    assert main(["configs", "cp", "recipe/w4"]) == 2
    assert "exists" in capsys.readouterr().err


def test_validate(capsys):
    assert main(["configs", "validate", "run", "recipe=w3"]) == 0
    assert capsys.readouterr().out == "qat run recipe=w3: fine\n"
    assert main(["configs", "validate", "trainer.max_steps=0", "model.path=/nowhere"]) == 2
    found = capsys.readouterr().err
    assert "trainer.max_steps: " in found
    assert "model.path: " in found
