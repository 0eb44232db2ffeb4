import json
from importlib.metadata import version
from pathlib import Path

from qat.cli import env
from qat.cli.main import main


def test_json(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("QAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("QAT_RUNS", str(tmp_path / "runs"))
    assert main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["packages"]["torch"] == version("torch")
    assert facts["packages"]["triton"] == env.package_version("triton")
    assert facts["directories"] == {"cache": str(tmp_path / "cache"), "runs": str(tmp_path / "runs")}
    assert facts["cpu"]["cores"] >= 1
    assert facts["cpu"]["isa"]
    assert isinstance(facts["cuda"]["devices"], list)
    assert facts["extras"].keys() == {"report", "serve"}


def test_table(capsys):
    assert main(["env"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("packages.torch ") for line in lines)
    assert any(line.startswith("cpu.isa ") for line in lines)


def test_a_key_is_noticed_and_never_shown(capsys, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert env.has_wandb_key() is False
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password verysecret\n")
    (tmp_path / "netrc").chmod(0o600)
    assert env.has_wandb_key() is True
    (tmp_path / "netrc").write_text("nonsense")
    assert env.has_wandb_key() is False
    monkeypatch.setenv("WANDB_API_KEY", "verysecret")
    assert main(["env"]) == 0
    text = capsys.readouterr().out
    assert "verysecret" not in text
    assert "wandb_key                    yes" in text


def test_what_is_not_installed_is_null():
    assert env.package_version("surely-not-a-package") is None


def test_the_cache_is_the_one_that_models_are_kept_in(monkeypatch):
    from qat.models import hf

    assert env.cache_dir() == hf.cache_dir()
    monkeypatch.delenv("QAT_CACHE")
    assert env.cache_dir() == hf.cache_dir() == Path.home() / ".cache/qat"


def test_options(capsys):
    import pytest

    with pytest.raises(SystemExit) as caught:
        main(["env", "--jsn"])
    assert caught.value.code == 2
    assert "--jsn" in capsys.readouterr().err
