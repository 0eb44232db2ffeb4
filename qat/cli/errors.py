"""What the command line says when a verb fails: one sentence for what a user can meet, a traceback for our defects."""

import errno
import importlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from qat.cli.problem import ConfigError, report

EXTRAS = {"fastapi": "serve", "uvicorn": "serve", "matplotlib": "report"}  # package to the extra that brings it
NETWORK = (
    *("OfflineModeIsEnabled", "LocalEntryNotFoundError", "HfHubHTTPError", "ConnectError", "ConnectTimeout"),
    *("ReadTimeout", "ConnectionError", "MaxRetryError", "gaierror", "NetworkError"),
)
ABSENT = ("RepositoryNotFoundError", "GatedRepoError", "RevisionNotFoundError", "DatasetNotFoundError")
UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
DEFECT = "a defect of qat, not of your configuration; please report the traceback above"
DEFECTS = (NotImplementedError, RecursionError)  # RuntimeErrors by descent


class MissingExtra(ImportError):
    """An optional dependency that is not installed."""


def require(package: str, extra: str) -> ModuleType:
    """Imports a package that an extra brings.

    Raises:
        MissingExtra: It is not installed; the message has the pip line.
    """
    try:
        return importlib.import_module(package)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != package.split(".")[0]:
            raise
        raise MissingExtra(f"{package} is not installed: pip install 'qat[{extra}]'") from None


def guard(command: str, call: Callable[[], int], config: dict[str, Any] | None = None) -> int:
    """Runs a command and turns what it raises into an exit status.

    1 failed, 2 misconfigured, 130 interrupted, 143 terminated.

    Args:
        command: What the message starts with, such as `qat run`.
        call: The command; what it returns is the status.
        config: The command's config, to name what a network error could not fetch.
    """
    try:
        return call()
    except KeyboardInterrupt:
        return _say(f"{command}: interrupted{_again(config)}", 130)
    except SystemExit as stop:
        # Lightning turns an interrupt into exit(1) after it has torn down, and SIGTERM into an exit with status 0.
        if any(isinstance(error, KeyboardInterrupt) for error in chain(stop)):
            return _say(f"{command}: interrupted{_again(config)}", 130)
        if _is_a(stop, "SIGTERMException"):
            return _say(f"{command}: terminated{_again(config)}", 143)
        raise
    except ConfigError as error:
        return _say(report(command, error.problems), 2)
    except BrokenPipeError:
        # `qat configs ls | head`: nobody reads on. Without this the interpreter complains when it flushes.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        text = explain(error, config)
        if text is None or os.environ.get("QAT_FULL_ERROR") == "1":
            traceback.print_exception(error)
        return _say(f"{command}: {text or DEFECT}", 1)


def explain(error: BaseException, config: dict[str, Any] | None = None) -> str | None:
    """One sentence about an error that a user can meet; None for one that only a defect raises."""
    while type(error).__name__ == "InstantiationException" and error.__cause__ is not None:
        error = error.__cause__  # Hydra's wrapper around what a target raised
    if isinstance(error, ImportError):
        return _import(error)
    if text := _memory(error) or _network(error, config):
        return text
    if any(_full(link) for link in chain(error)):  # PyTorch and safetensors wrap it in errors of their own
        file = getattr(error, "filename", None)
        return f"the disk is full{f' at {file}' if file else ''}; free some space, or set QAT_RUNS to another disk"
    if isinstance(error, OSError):
        return _system(error)
    if _is_a(error, "SafetensorError"):
        return f"a safetensors file is damaged or not one: {_line(error)}"
    if isinstance(error, ValueError | RuntimeError) and not isinstance(error, DEFECTS):
        return _line(error)
    return _line(error) if _is_a(error, "MisconfigurationException") else None  # Lightning's, about trainer.lightning


def chain(error: BaseException) -> Iterator[BaseException]:
    """An error and what it was raised from, or while handling."""
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__ or (None if link.__suppress_context__ else link.__context__)


def _again(config: dict[str, Any] | None) -> str:
    """What a verb that resumes says of a run that was cut off."""
    resumes = config and (config.get("resume") == "auto" or config.get("verb") == "generate")
    return "; the same command goes on from there" if resumes else ""


def _say(text: str, status: int) -> int:
    print(text, file=sys.stderr)
    return status


def _line(error: BaseException) -> str | None:
    """An error's words on one line; None if it has none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    more = " (QAT_FULL_ERROR=1 shows the rest)" if len(lines) > 1 else ""
    return f"{lines[0]}{more}" if lines else None


def _is_a(error: BaseException, *names: str) -> bool:
    """By name, because the classes live in packages that may not have been imported."""
    return any(base.__name__ in names for base in type(error).__mro__)


def _import(error: ImportError) -> str | None:
    package = (error.name or "").split(".")[0]
    if isinstance(error, MissingExtra):
        return str(error)
    if package in EXTRAS:
        return f"{package} is not installed: pip install 'qat[{EXTRAS[package]}]'"
    if isinstance(error, ModuleNotFoundError) and package != "qat":
        return f"{package} is not installed; `pip install qat` brings it"
    return None


def _memory(error: BaseException) -> str | None:
    text = str(error)
    cure = "lower the batch sizes (trainer, calibration, evaluation, sequences) or seq_len, or engine.kv_memory_gib"
    if _is_a(error, "OutOfMemoryError") or "CUDA out of memory" in text:
        return f"the GPU's memory is full; {cure}"
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
        return f"the machine's memory is full; {cure}"
    return None


def _network(error: BaseException, config: dict[str, Any] | None) -> str | None:
    links = list(chain(error))
    if isinstance(error, ConnectionError) and error.errno is not None:
        return None  # a socket of this machine, the server's, say
    absent = any(_is_a(link, *ABSENT) for link in links)
    if not absent and not any(_is_a(link, *NETWORK) for link in links):
        return None
    thing, cure = _wanted(" ".join(map(str, links)), config or {})
    if absent:
        return f"the Hugging Face hub has no {thing}, or it is private (set HF_TOKEN); a local copy goes in {cure}"
    return f"no network: {thing} could not be fetched from the Hugging Face hub; a local copy goes in {cure}"


def _wanted(text: str, config: dict[str, Any]) -> tuple[str, str]:
    """What was to be fetched, and the key for a local copy of it."""
    model, data = config.get("model") or {}, config.get("data") or {}
    things = {
        "model": (model.get("name"), model.get("path"), f"the model {model.get('name')}", "model.path="),
        "data": (
            *((data.get("source") or {}).get("name"), data.get("path")),
            *(f"the data set {(data.get('source') or {}).get('name')}", "data.path="),
        ),
    }
    remote = [(name, thing, cure) for name, path, thing, cure in things.values() if name and not path]
    named = [entry for entry in remote if entry[0] in text] or remote
    if len(named) == 1:
        return named[0][1], named[0][2]
    return "the model or the data set", "model.path= or data.path="


def _full(error: BaseException) -> bool:
    codes = (errno.ENOSPC, errno.EDQUOT)
    named = isinstance(error, OSError) and error.errno in codes
    return named or (_is_a(error, "SafetensorError") and any(f"(os error {code})" in str(error) for code in codes))


def _system(error: OSError) -> str | None:
    where = f" {error.filename}" if error.filename else ""
    if error.errno in UNWRITABLE:
        return f"no permission to use{where or ' a file'}; choose another directory (runs=DIR, or QAT_RUNS)"
    if error.errno == errno.ENOENT:
        return f"no such file or directory:{where}" if where else _line(error)
    if error.errno == errno.ENOTDIR:
        return f"a file is where a directory should be:{where}; choose another directory (runs=DIR, or QAT_RUNS)"
    if error.errno == errno.EADDRINUSE:
        return "the port is taken; choose another with server.port="
    return _line(error)
