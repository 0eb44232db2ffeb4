"""A run directory is found again, is nobody else's while it is used, and is never used again once it is finished."""

import copy
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from qat.cli.errors import guard
from qat.cli.rundir import RunDir, config_sha, export_of, find, git, is_finished, versions

CONFIG = {
    "verb": "run",
    "choices": {"experiment": "quick", "recipe": "w4", "logger": "wandb"},
    "resume": "auto",
    "dry_run": False,
    "seed": 1,
    "optim": {"lr": 1e-4},
    "logger": {"wandb": None},
}


@pytest.fixture
def config(tmp_path):
    return CONFIG | {"runs": str(tmp_path / "runs")}


def begin(config, **more):
    """A run that was begun and is nobody's any more: its lock is gone, as after a kill."""
    run = RunDir.open(config | more)
    run.start(config | more, {"device": "A CPU"})
    return run.path


def test_a_new_run_has_a_directory_of_its_own(config, tmp_path):
    run = RunDir.open(config)
    assert not run.resumed
    assert RunDir.open(config).path != run.path
    assert run.path.parent == tmp_path / "runs" / "quick"
    assert re.fullmatch(r"\d{8}-\d{6}-[0-9a-f]{4}", run.path.name)


def test_without_an_experiment_the_verb_names_it(config):
    assert RunDir.open(config | {"choices": {"experiment": None}}).path.parent.name == "run"


def test_a_relative_directory_is_made_absolute_at_once(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = RunDir.open(config | {"runs": "here"})
    assert run.path.is_absolute()
    monkeypatch.chdir("/")
    run.start(config, {})
    assert (tmp_path / "here" / "latest" / "run.json").is_file()
    assert not Path(os.readlink(tmp_path / "here" / "latest")).is_absolute()  # the tree can be moved


def test_what_a_run_says_of_itself(config):
    run = RunDir.open(config)
    run.start(config, {"device": "A CPU", "seed": 1})
    assert yaml.safe_load((run.path / "config.yaml").read_text()) == config
    facts = json.loads((run.path / "run.json").read_text())
    assert facts == run.facts
    assert facts["status"] == "running"
    assert facts["config_sha"] == config_sha(config)
    assert facts["resumed"] == 0
    assert facts["argv"] == sys.argv
    assert facts["device"] == "A CPU"
    assert facts["versions"].keys() >= {"torch", "transformers"}
    assert facts["host"].keys() == {"python", "system", "cpus"}
    run.finish()
    assert run.facts == facts | {"status": "finished"}


def test_auto_goes_on_with_an_unfinished_run_of_the_same_config(config):
    path = begin(config)
    started = json.loads((path / "run.json").read_text())["started"]
    again = RunDir.open(config)
    assert again.resumed
    assert again.path == path
    again.start(config, {})
    assert again.facts["resumed"] == 1
    assert again.facts["started"] == started


def test_auto_takes_the_newest(config):
    older, newer = begin(config, resume="never"), begin(config, resume="never")
    os.rename(older, older.parent / "20200101-000000-abcd")
    assert RunDir.open(config).path == newer


@pytest.mark.parametrize("status", ["finished", "gone"])
def test_auto_leaves_alone_what_is_finished_or_no_run(config, status):
    path = begin(config)
    if status == "finished":
        RunDir.existing(path).finish()
    else:
        (path / "run.json").unlink()
    assert not RunDir.open(config).resumed


def test_auto_leaves_a_run_alone_that_was_finished_while_it_looked(config, monkeypatch):
    """Its owner finishes and ends between our look at run.json and our lock."""
    path = begin(config)
    from qat.cli import rundir

    lock = rundir._lock

    def late(at):
        if at == path:
            state = json.loads((path / "run.json").read_text())
            (path / "run.json").write_text(json.dumps(state | {"status": "finished"}))
        return lock(at)

    monkeypatch.setattr(rundir, "_lock", late)
    assert not RunDir.open(config).resumed


@pytest.mark.parametrize(
    "change", [{"seed": 2}, {"optim": {"lr": 2e-4}}, {"choices": CONFIG["choices"] | {"recipe": "w3"}}, {"more": 1}]
)
def test_auto_wants_the_same_numbers(config, change):
    begin(config)
    assert not RunDir.open(config | change).resumed


@pytest.mark.parametrize(
    "change",
    [{"logger": {"wandb": {"mode": "online"}}}, {"choices": CONFIG["choices"] | {"logger": "none"}}],
    ids=["settings", "choice"],
)
def test_where_a_run_reports_to_may_change(config, change):
    path = begin(config)
    assert RunDir.open(config | change).path == path


def test_another_experiment_is_another_run(config):
    begin(config)
    assert not RunDir.open(config | {"choices": config["choices"] | {"experiment": "other"}}).resumed


def test_never(config):
    path = begin(config)
    run = RunDir.open(config | {"resume": "never"})
    assert not run.resumed
    assert run.path != path


def test_a_run_is_resumed_by_its_path(config, tmp_path, monkeypatch):
    path = begin(config)
    begin(config, resume="never")
    monkeypatch.chdir(path.parent)
    for name in (str(path), path.name, f"quick/{path.name}", "latest"):
        run = RunDir.open(config | {"resume": name})
        assert run.resumed
        assert run.path.is_absolute()
        assert run.path.samefile(path)
        assert (tmp_path / "runs" / "latest").resolve() == path
        del run


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("missing", "no run directory"),
        ("finished", "this run is finished; start a new one with resume=never"),
        ("other", "started with another configuration; see its config.yaml"),
        ("locked", "in use by another process"),
    ],
)
def test_a_path_that_cannot_be_resumed_says_why(config, damage, words):
    path = begin(config)
    held = None
    if damage == "missing":
        (path / "run.json").unlink()
    elif damage == "locked":
        held = RunDir.existing(path)
    elif damage == "finished":
        held = RunDir.existing(path)
        held.finish()
    seed = 2 if damage == "other" else 1
    with pytest.raises(ValueError, match=words) as caught:
        RunDir.open(config | {"resume": str(path), "seed": seed})
    assert str(caught.value).startswith(f"resume={path}: ")


def test_a_run_in_use_is_nobody_elses(config):
    path = begin(config)
    held = RunDir.open(config)
    assert held.path == path
    assert RunDir.open(config).path != path
    with pytest.raises(ValueError, match=f"run={path}: in use by another process"):
        RunDir.existing(path)
    del held
    assert RunDir.existing(path).resumed


def test_the_lock_dies_with_its_process(config):
    path = begin(config)
    code = (
        "import sys, os; from pathlib import Path; from qat.cli.rundir import RunDir\n"
        "run = RunDir.existing(Path(sys.argv[1])); print('held', flush=True); sys.stdin.read(); os._exit(9)"
    )
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        assert RunDir.open(config).path != path
        process.kill()
        process.wait()
    assert RunDir.open(config).path == path


def test_a_dry_run_takes_up_nothing_and_leaves_latest_where_it_was(config, tmp_path):
    path = begin(config)
    for resume in ("auto", str(path)):
        run = RunDir.open(config | {"dry_run": True, "resume": resume})
        assert not run.resumed
        run.finish()
    assert (tmp_path / "runs" / "latest").resolve() == path
    assert RunDir.open(config).path == path


def test_latest_is_the_run_that_was_begun_or_taken_up_last(config, tmp_path):
    latest = tmp_path / "runs" / "latest"
    first = begin(config)
    assert latest.resolve() == first
    second = begin(config, seed=2)
    assert latest.resolve() == second
    RunDir.open(config)
    assert latest.resolve() == first
    assert [path.name for path in latest.parent.iterdir() if path.name.startswith(".")] == []


def test_a_file_is_replaced_whole_or_not_at_all(config, monkeypatch):
    run = RunDir.open(config)
    run.write("summary.json", {"a": 1})
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(OSError))
    with pytest.raises(OSError):  # noqa: PT011
        run.write("summary.json", {"a": 2})
    assert run.read("summary.json") == {"a": 1}
    assert run.read("nothing.json") == {}


def test_a_cut_file_reads_as_none(config):
    run = RunDir.open(config)
    for text in ('{"a": ', "[1]", ""):
        (run.path / "summary.json").write_text(text)
        assert run.read("summary.json") == {}


def test_a_run_is_found_by_what_people_type(config, tmp_path, monkeypatch):
    path = begin(config)
    monkeypatch.chdir(tmp_path)
    name = f"quick/{path.name}"
    for runs, run in (("runs", "latest"), (config["runs"], "latest"), ("x", f"runs/{name}"), ("runs", name)):
        assert find(runs, run) == path
    for run in ("nothing", "runs/quick"):
        with pytest.raises(ValueError, match=f"run={run}: no run at .*; start one with `qat run"):
            find("runs", run)
    with pytest.raises(ValueError, match="run=latest: no run at elsewhere/latest"):
        find("elsewhere", "latest")


def test_the_export_of_a_run_is_its_own_not_one_that_was_written_beside_it(config):
    path = begin(config)
    with pytest.raises(ValueError, match=r"run=latest: .* has no export yet; repeat its command to finish it"):
        export_of(config["runs"], "latest")
    for age, name in ((100, "own"), (0, "rtn-later")):
        file = path / "export" / name / "config.json"
        file.parent.mkdir(parents=True)
        file.touch()
        os.utime(file, (1000 - age, 1000 - age))
    (path / "summary.json").write_text(json.dumps({"export": {"path": "/where/the/run/was/once/own"}}))
    assert export_of(config["runs"], "latest") == path / "export" / "own"


def exported(path):
    (path / "export" / "own").mkdir(parents=True)
    (path / "export" / "own" / "config.json").touch()
    (path / "summary.json").write_text(json.dumps({"export": {"path": "own"}}))
    return path


def test_latest_is_the_newest_that_has_what_is_wanted(config, capsys):
    """A run that was begun later, and has no export, takes nothing away; and that another is meant is said."""
    old, new = (exported(begin(config, seed=seed)) for seed in (2, 3))
    for path, day in ((old, 1), (new, 2)):
        facts = json.loads((path / "run.json").read_text())
        (path / "run.json").write_text(json.dumps(facts | {"started": f"2026-01-0{day}"}))
    without = begin(config, seed=4)
    assert find(config["runs"], "latest") == without.resolve()
    assert capsys.readouterr().err == ""
    assert export_of(config["runs"], "latest") == new / "export" / "own"
    said = capsys.readouterr().err
    assert f"{without} has not what is wanted here; the newest that has: {new}" in said
    with pytest.raises(ValueError, match="has no export yet"):
        export_of(config["runs"], str(without))
    exported(without)
    assert export_of(config["runs"], "latest") == without / "export" / "own"
    assert capsys.readouterr().err == ""


def test_a_run_at_work_is_not_to_be_repeated(config):
    run = RunDir.open(config)
    run.start(config, {})
    with pytest.raises(ValueError, match="has no export yet; another process is at it; wait for it"):
        export_of(config["runs"], "latest")


def test_finished_is_of_a_verb_and_not_dry(config):
    path = begin(config)
    assert not is_finished(path, "run")
    for dry, verbs, expected in ((False, ("train", "run"), True), (False, ("train",), False), (True, ("run",), False)):
        run = RunDir.open(config | {"resume": "never", "dry_run": dry})
        run.start(config | {"dry_run": dry}, {})
        run.finish()
        assert is_finished(run.path, *verbs) is expected
    assert not is_finished(path / "nothing", "run")


def test_the_sha_is_that_of_the_content(config):
    shuffled = dict(reversed(copy.deepcopy(config).items()))
    assert config_sha(shuffled) == config_sha(config)
    assert config_sha(config | {"runs": "x", "resume": "never", "dry_run": True}) == config_sha(config)
    assert config_sha(config | {"device": "cpu"}) != config_sha(config)
    exports = [{"dtype": "bfloat16"}, {"dtype": "bfloat16", "target": "vllm"}, {"dtype": "float16", "target": "vllm"}]
    bare, checked, other = (config_sha(config | {"export": export}) for export in exports)
    assert bare == checked != other


def test_a_directory_that_cannot_be_written(config, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert guard("qat run", lambda: RunDir.open(config | {"runs": str(tmp_path / "file" / "x")}).resumed) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "file") in line
    assert "choose another directory (runs=DIR, or QAT_RUNS)" in line


def test_no_permission(config, monkeypatch, capsys):
    def refuse(self, *args, **kwargs):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    assert guard("qat run", lambda: RunDir.open(config).resumed) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"qat run: no permission to use {config['runs']}/quick/")


def test_versions_and_commit(monkeypatch):
    import torch

    assert versions()["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    assert "surely-not-a-package" not in versions()
    found = git()
    assert found is None or re.fullmatch("[0-9a-f]{40}", found["sha"])
    monkeypatch.setenv("PATH", "")
    assert git() is None
