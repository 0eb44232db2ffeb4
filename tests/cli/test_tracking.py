"""W&B as a stub that keeps what it is told: nothing here reaches a network or starts a process."""

import sys
from types import SimpleNamespace

import pytest

from qat.cli import tracking

WANDB = {"project": "qat", "entity": None, "mode": "auto", "tags": ["mine"]}
CONFIG = {
    "verb": "run",
    "seed": 7,
    "model": {"name": "tiny"},
    "choices": {"recipe": "w4", "data": "text", "experiment": "quick"},
    "logger": {"wandb": WANDB},
}


class Run:
    def __init__(self):
        self.summary, self.finished = {}, 0

    def finish(self):
        self.finished += 1


@pytest.fixture
def calls(monkeypatch):
    """What `wandb.init` was called with."""
    found = []
    stub = SimpleNamespace(init=lambda **kwargs: found.append(kwargs) or Run(), Settings=lambda **kwargs: kwargs)
    monkeypatch.setitem(sys.modules, "wandb", stub)
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tracking, "has_key", lambda: False)
    return found


@pytest.mark.parametrize("logger", [{"wandb": None}, {}, None])
def test_without_it_wandb_is_not_even_imported(monkeypatch, tmp_path, logger):
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import would fail
    assert tracking.open_run(CONFIG | {"logger": logger}, tmp_path, "x") is None
    tracking.close(None, {"arms": {}})


def test_a_run_is_named_by_what_people_look_for(calls, tmp_path):
    tracking.open_run(CONFIG, tmp_path, "20260101-id")
    (call,) = calls
    assert call["project"] == "qat"
    assert call["group"] == "tiny/text/quick"
    assert call["job_type"] == "run"
    assert call["name"] == "w4-s7"
    assert call["tags"] == ["w4", "run", "mine"]
    assert call["config"] == CONFIG
    assert call["dir"] == tmp_path
    assert call["id"] == "20260101-id"


@pytest.mark.parametrize(
    ("mode", "variable", "key", "expected"),
    [
        ("auto", None, False, "offline"),
        ("auto", None, True, "online"),
        ("auto", "disabled", True, "disabled"),
        ("offline", None, True, "offline"),
        ("online", "offline", False, "online"),
    ],
)
def test_online_only_with_a_key_or_on_demand(calls, tmp_path, monkeypatch, mode, variable, key, expected):
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    monkeypatch.setattr(tracking, "has_key", lambda: key)
    tracking.open_run(CONFIG | {"logger": {"wandb": WANDB | {"mode": mode}}}, tmp_path, "x")
    assert calls[0]["mode"] == expected
    assert calls[0]["resume"] == ("allow" if expected == "online" else None)


def test_a_key_is_noticed(monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not tracking.has_key()
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password secret\n")
    (tmp_path / ".netrc").chmod(0o600)
    assert tracking.has_key()
    (tmp_path / ".netrc").write_text("nonsense")
    assert not tracking.has_key()
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    assert tracking.has_key()


def test_the_summary_has_what_runs_are_sorted_by():
    run = Run()
    arms = {"qat": {"ppl": 11.5, "kl": 0.05, "seed": 1, "fallbacks": [], "windows": {}, "odd": True}}
    recovered = {"vs_rtn": {"kl": 0.5, "nll": None}, "vs_best_ptq": {"kl": {"value": 0.5, "winner": "rtn"}}}
    tracking.close(run, {"arms": arms, "recovered": recovered, "export": {"verified": True}})
    assert run.summary == {
        "ppl/qat": 11.5,
        "kl/qat": 0.05,
        "seed/qat": 1,
        "recovered/vs_rtn/kl": 0.5,
        "recovered/vs_rtn/nll": None,
        "export/verified": True,
    }
    assert run.finished == 1


def test_a_run_that_failed_is_ended_too():
    run = Run()
    tracking.close(run, {"arms": {}})
    assert run.finished == 1
