import errno
import os
import signal
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from qat.cli.errors import EXTRAS, MissingExtra, explain, guard, require
from qat.cli.problem import ConfigError, Problem

CONFIG = {
    "model": {"name": "some/model", "path": None},
    "data": {"path": None, "source": {"_target_": "qat.data.sources.Hub", "name": "some/text"}},
}


def raising(error):
    def call():
        raise error

    return call


def made(name, *bases):
    """An exception class of this name, as packages that are not imported here define it."""
    return type(name, bases or (Exception,), {})


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ValueError("model.layers.0: bits=9 is too many"), "model.layers.0: bits=9 is too many"),
        (ValueError("one\ntwo"), "one (QAT_FULL_ERROR=1 shows the rest)"),
        (RuntimeError("no kernel for this device"), "no kernel for this device"),
        (OSError(errno.ENOSPC, "No space left", "/full/disk"), "the disk is full at /full/disk"),
        (OSError(errno.EACCES, "Permission denied", "/locked"), "no permission to use /locked"),
        (OSError(errno.EROFS, "Read-only", "/sealed"), "no permission to use /sealed"),
        (
            NotADirectoryError(errno.ENOTDIR, "Not a directory", "/file/x"),
            "a file is where a directory should be: /file/x",
        ),
        (made("SafetensorError")("I/O error: No space left on device (os error 28)"), "the disk is full; free"),
        (OSError(errno.EADDRINUSE, "in use"), "the port is taken"),
        (FileNotFoundError(errno.ENOENT, "No such file", "/gone"), "no such file or directory: /gone"),
        (made("OutOfMemoryError", RuntimeError)("CUDA out of memory. Tried ..."), "the GPU's memory is full; lower"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "the machine's memory is full"),
        (MemoryError(), "the machine's memory is full"),
        (made("SafetensorError")("HeaderTooLarge"), "a safetensors file is damaged or not one: HeaderTooLarge"),
        (made("MisconfigurationException")("no such strategy"), "no such strategy"),
        (ModuleNotFoundError("No module named 'uvicorn'", name="uvicorn"), "pip install 'qat[serve]'"),
        (ModuleNotFoundError("No module named 'gguf'", name="gguf"), "gguf is not installed"),
        (MissingExtra("x is not installed: pip install 'qat[y]'"), "pip install 'qat[y]'"),
    ],
)
def test_what_a_user_can_meet_is_one_sentence(error, words, capsys, monkeypatch):
    monkeypatch.delenv("QAT_FULL_ERROR", raising=False)
    assert guard("qat run", raising(error)) == 1
    text = capsys.readouterr().err
    assert text.startswith("qat run: ")
    assert words in text
    assert text.count("\n") == 1


def test_a_full_disk_is_found_behind_what_pytorch_makes_of_it(capsys):
    """torch.save raises a RuntimeError about positions in its archive, in the context of the system's own error."""

    def save():
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")

    assert guard("qat run", save) == 1
    assert capsys.readouterr().err.startswith("qat run: the disk is full; free some space")


@pytest.mark.parametrize(
    "error",
    [
        AssertionError("codes moved"),
        KeyError("x"),
        TypeError("x"),
        AttributeError("x"),
        NotImplementedError("x"),
        ValueError(),
        ImportError("cannot import name x", name="qat.cli.run"),
        ModuleNotFoundError("No module named 'qat.cli.nothing'", name="qat.cli.nothing"),
    ],
)
def test_a_defect_shows_its_traceback(error, capsys):
    assert guard("qat run", raising(error)) == 1
    text = capsys.readouterr().err
    assert "Traceback" in text
    assert "please report" in text


def test_the_traceback_can_be_asked_for(capsys, monkeypatch):
    monkeypatch.setenv("QAT_FULL_ERROR", "1")
    assert guard("qat run", raising(ValueError("bad"))) == 1
    text = capsys.readouterr().err
    assert "Traceback" in text
    assert text.endswith("qat run: bad\n")


def test_a_configuration_found_wrong_late_is_still_one(capsys):
    assert guard("qat run", raising(ConfigError([Problem("a", "x")]))) == 2
    assert capsys.readouterr().err == "qat run: 1 problem\n  a: x\n"


def test_hydras_wrapper_is_taken_off():
    wrapped = made("InstantiationException")("Error in call to target")
    wrapped.__cause__ = ValueError("bits=9")
    assert explain(wrapped) == "bits=9"
    wrapped.__cause__ = AssertionError()
    assert explain(wrapped) is None


def network(name, text, outer="could not load"):
    try:
        try:
            raise made(name)(text)
        except Exception as inner:
            raise OSError(outer) from inner
    except OSError as error:
        return error


def test_no_network_names_the_thing_and_its_key():
    model = explain(network("LocalEntryNotFoundError", "some/model/resolve/main/config.json"), CONFIG)
    assert "the model some/model could not be fetched" in model
    assert model.endswith("model.path=")
    data = explain(ConnectionError("Couldn't reach 'some/text' on the Hub (OfflineModeIsEnabled)"), CONFIG)
    assert "the data set some/text could not be fetched" in data
    assert data.endswith("data.path=")
    both = explain(network("ConnectError", "Name or service not known"), CONFIG)
    assert "the model or the data set" in both
    assert explain(network("ConnectError", "?"), CONFIG | {"model": {"name": "x", "path": "here"}}) == data
    assert "the hub has no" in explain(network("RepositoryNotFoundError", "some/model"), CONFIG).replace(
        "Hugging Face ", ""
    )


def test_transformers_and_datasets_really_raise_what_is_looked_for(monkeypatch):
    import datasets
    from transformers import AutoConfig

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="connect") as caught:
        AutoConfig.from_pretrained("nobody/nothing")
    assert "no network" in explain(caught.value, CONFIG)
    with pytest.raises(ConnectionError) as caught:
        datasets.load_dataset("nobody/nothing")
    assert "no network" in explain(caught.value, CONFIG)


def test_a_socket_of_this_machine_is_no_network_of_the_hub():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        with socket.socket() as other, pytest.raises(OSError, match="in use") as caught:
            other.bind(taken.getsockname())
    assert explain(caught.value) == "the port is taken; choose another with server.port="
    assert "hub" not in (explain(ConnectionRefusedError(errno.ECONNREFUSED, "refused")) or "")


def test_interrupts(capsys):
    assert guard("qat run", raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "qat run: interrupted\n"

    def lightning():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    assert guard("qat run", lightning) == 130
    with pytest.raises(SystemExit):
        guard("qat env", lambda: sys.exit(2))


def test_a_run_that_resumes_says_so_when_it_is_cut_off(capsys):
    def stop(error):
        raise error

    terminated = type("SIGTERMException", (SystemExit,), {})()
    assert guard("qat run", lambda: stop(KeyboardInterrupt()), {"resume": "auto"}) == 130
    assert guard("qat run", lambda: stop(terminated), {"resume": "auto"}) == 143
    assert guard("qat run", lambda: stop(terminated), {"resume": "never"}) == 143
    again = "; the same command goes on from there"
    lines = [f"qat run: interrupted{again}", f"qat run: terminated{again}", "qat run: terminated"]
    assert capsys.readouterr().err.splitlines() == lines


def test_an_interrupt_from_outside_ends_with_130_and_one_line():
    code = (
        "import sys, time; from qat.cli.errors import guard\n"
        "def call():\n    print('ready', flush=True)\n    time.sleep(30)\n"
        "sys.exit(guard('qat run', call))"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=20)
    assert (process.returncode, text) == (130, "qat run: interrupted\n")


def test_nobody_reads_on():
    code = "import sys; from qat.cli.errors import guard; sys.exit(guard('qat', lambda: print('x\\n' * 10**6)))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    text = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=20) == 1
    assert text == ""


def test_require_imports_or_says_how_to_install():
    assert require("json", "serve").dumps({}) == "{}"
    with pytest.raises(MissingExtra, match=r"not_there is not installed: pip install 'qat\[serve\]'"):
        require("not_there", extra="serve")


def test_require_does_not_hide_a_broken_package(tmp_path, monkeypatch):
    (tmp_path / "half_broken.py").write_text("import something_else_entirely")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="something_else_entirely"):
        require("half_broken", extra="serve")


def test_the_extras_are_those_of_the_project():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    named = {
        requirement.split(">")[0].replace("-", "_"): extra
        for extra, requirements in project["optional-dependencies"].items()
        for requirement in requirements
        if extra != "dev"
    }
    assert named == EXTRAS


def test_an_unwritable_directory_names_its_path(tmp_path):
    if os.geteuid() == 0:
        error = PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "runs"))  # root may write anywhere
    else:
        tmp_path.chmod(0o500)
        with pytest.raises(PermissionError) as caught:
            (tmp_path / "runs").mkdir()
        error = caught.value
    assert explain(error) == f"no permission to use {tmp_path}/runs; choose another directory (runs=DIR, or QAT_RUNS)"
