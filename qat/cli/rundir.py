"""The run directory: fixed by the parent process, resumed if unfinished, never used by two processes at once.

runs/<experiment>/<time>-<id>/{config.yaml, run.json, metrics.jsonl, summary.json, checkpoints/, export/, plots/}
runs/latest -> the one that was begun or taken up last; to those who want an export or measurements, `latest` is the
newest run that has them
"""

import fcntl
import hashlib
import json
import os
import platform
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

PACKAGES = ("qat", "torch", "transformers", "pytorch-lightning", "compressed-tensors", "datasets", "wandb", "triton")
NOT_NUMERIC = ("runs", "resume", "dry_run", "logger")  # keys that a resumed run may change


class RunDir:
    """One run's directory, locked for as long as this object lives, and its process.

    Attributes:
        path: Absolute.
        resumed: Whether an unfinished run goes on here.
    """

    def __init__(self, path: Path, lock: int, resumed: bool):
        self.path, self._lock, self.resumed = path, lock, resumed

    def __del__(self) -> None:
        os.close(self._lock)

    @classmethod
    def open(cls, config: dict[str, Any]) -> "RunDir":
        """Finds the run to go on with, as `resume` says, or makes a new one. A dry run takes up nothing.

        Raises:
            ValueError: `resume` names a directory that is no run, is in use, or has another configuration.
            OSError: The directory cannot be written.
        """
        root = Path(config["runs"]).expanduser().absolute()
        experiment = config["choices"].get("experiment") or config["verb"]
        sha = config_sha(config)
        wanted = config["resume"]
        dry = config["dry_run"]
        if wanted not in ("auto", "never") and not dry:
            found = cls._resume(_named(root, wanted).resolve(), sha)
            _link(root, found.path)
            return found
        if wanted == "auto" and not dry:
            for path in sorted((root / experiment).glob("*-*"), reverse=True):
                if _resumable(path, sha) and (lock := _lock(path)) is not None:
                    if _resumable(path, sha):  # still, now that it is ours
                        _link(root, path)
                        return cls(path, lock, resumed=True)
                    os.close(lock)
        path = root / experiment / f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(2)}"
        path.mkdir(parents=True)
        lock = _lock(path)
        assert lock is not None, "a new directory is nobody's"
        if not dry:
            _link(root, path)
        return cls(path, lock, resumed=False)

    @classmethod
    def _resume(cls, path: Path, sha: str) -> "RunDir":
        state = _read(path / "run.json")
        if not state:
            raise ValueError(f"resume={path}: no run directory (it has no run.json)")
        if state.get("status") == "finished":
            raise ValueError(f"resume={path}: this run is finished; start a new one with resume=never")
        if state["config_sha"] != sha:
            raise ValueError(f"resume={path}: it was started with another configuration; see its config.yaml")
        if (lock := _lock(path)) is None:
            raise ValueError(f"resume={path}: in use by another process")
        return cls(path, lock, resumed=True)

    @classmethod
    def existing(cls, path: Path) -> "RunDir":
        """A run directory as it is, locked.

        Raises:
            ValueError: Another process works in it.
        """
        if (lock := _lock(path)) is None:
            raise ValueError(f"run={path}: in use by another process; wait for it to end")
        return cls(path, lock, resumed=True)

    def start(self, config: dict[str, Any], facts: dict[str, Any]) -> None:
        """Writes config.yaml and run.json."""
        (self.path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        before = _read(self.path / "run.json")
        run = {
            "argv": sys.argv,
            "status": "running",
            "config_sha": config_sha(config),
            "started": before.get("started") or time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "resumed": before.get("resumed", -1) + 1,
            "git": git(),
            "versions": versions(),
            "host": {"python": platform.python_version(), "system": platform.platform(), "cpus": os.cpu_count()},
            **facts,
        }
        self.write("run.json", run)

    def finish(self) -> None:
        """Marks the run finished: nothing resumes it."""
        self.write("run.json", _read(self.path / "run.json") | {"status": "finished"})

    @property
    def facts(self) -> dict[str, Any]:
        """What run.json holds."""
        return _read(self.path / "run.json")

    def read(self, name: str) -> dict[str, Any]:
        """A JSON object of the run; empty if there is none."""
        return _read(self.path / name)

    def write(self, name: str, content: dict[str, Any]) -> None:
        """Replaces a JSON file, whole or not at all."""
        part = self.path / f".{name}.part"
        part.write_text(json.dumps(content, indent=1), encoding="utf-8")
        part.replace(self.path / name)


def find(runs: str, run: str, fits: Callable[[Path], bool] | None = None) -> Path:
    """The directory of a run: `latest`, or a path, as it is or below `runs`.

    Args:
        runs: The directory of all runs.
        run: What was typed.
        fits: What the run is wanted for: if the latest one does not fit, `latest` is the newest of those that do, which
            is then said on stderr.

    Raises:
        ValueError: There is no such run.
    """
    path = _named(Path(runs).expanduser(), run)
    if run == "latest" and fits is not None and path.is_dir() and not fits(path):
        others = [file.parent for file in path.parent.glob("*/*/run.json") if fits(file.parent)]
        if others:
            newest = max(others, key=lambda other: str(_read(other / "run.json").get("started")))
            print(f"{path.resolve()} has not what is wanted here; the newest that has: {newest}", file=sys.stderr)
            path = newest
    if not (path / "run.json").is_file():
        raise ValueError(
            f"run={run}: no run at {path}; start one with `qat run experiment=quickstart`, or name another"
        )
    return path.resolve()


def export_of(runs: str, run: str) -> Path:
    """The exported checkpoint of a run.

    Raises:
        ValueError: There is no such run, or it has not come to exporting.
    """
    path = find(runs, run, lambda path: _export(path) is not None)
    if (export := _export(path)) is None:
        at_work = "another process is at it; wait for it" if _in_use(path) else "repeat its command to finish it"
        raise ValueError(f"run={run}: {path} has no export yet; {at_work}, or name another run")
    return export


def is_finished(path: Path, *verbs: str) -> bool:
    """Whether a directory is that of a finished run of one of some verbs, and not of a dry one."""
    try:
        config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError):
        return False
    return config["verb"] in verbs and not config["dry_run"] and _read(path / "run.json").get("status") == "finished"


def config_sha(config: dict[str, Any]) -> str:
    """SHA-256 of everything in a resolved config that can change a number."""
    content = {key: value for key, value in config.items() if key not in NOT_NUMERIC}
    if "export" in content:  # whom it is checked for changes no number
        content["export"] = {key: value for key, value in content["export"].items() if key != "target"}
    content["choices"] = {key: value for key, value in config["choices"].items() if key not in NOT_NUMERIC}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def versions() -> dict[str, str]:
    """Versions of the packages whose numerics matter."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git() -> dict[str, Any] | None:
    """Commit of the source tree and whether it has changes; None outside of a checkout."""
    root = Path(__file__).resolve().parents[2]
    try:
        calls = (["git", "rev-parse", "HEAD"], ["git", "status", "--porcelain"])
        sha, status = (
            subprocess.run(c, cwd=root, capture_output=True, text=True, timeout=10, check=True) for c in calls
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return {"sha": sha.stdout.strip(), "dirty": bool(status.stdout.strip())}


def _named(runs: Path, run: str) -> Path:
    """The directory that a name stands for: `latest` below `runs`, else as it is, else below `runs`."""
    path = Path(run).expanduser()
    return runs / path if run == "latest" or (not path.is_dir() and (runs / path).is_dir()) else path


def _export(path: Path) -> Path | None:
    """The exported checkpoint of a run, and not what `qat export` wrote beside it; None if there is none."""
    own = (_read(path / "summary.json").get("export") or {}).get("path")
    found = None if own is None else path / "export" / Path(own).name
    return found if found is not None and (found / "config.json").is_file() else None


def _in_use(path: Path) -> bool:
    lock = _lock(path)
    if lock is not None:
        os.close(lock)
    return lock is None


def _resumable(path: Path, sha: str) -> bool:
    state = _read(path / "run.json")
    return state.get("config_sha") == sha and state.get("status") != "finished"


def _link(root: Path, path: Path) -> None:
    link = root / f".latest.{os.getpid()}"
    root.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(os.path.relpath(path.resolve(), root.resolve()))
    link.replace(root / "latest")


def _lock(path: Path) -> int | None:
    """An open file, whose lock dies with the process; None if another process holds it."""
    file = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
