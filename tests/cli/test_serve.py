"""qat serve, as a process: what it prints, what it answers, how it ends."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest
from tiny_export import export

from qat.cli import serve
from qat.cli.errors import MissingExtra
from qat.cli.main import main
from qat.server import listen

pytestmark = pytest.mark.whole

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run directory with an export."""
    run = tmp_path_factory.mktemp("runs") / "first" / "20260101-000000-abcd"
    (run / "export").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    (run / "summary.json").write_text('{"export": {"path": "export/compressed_tensors"}}')
    export(run / "export" / "compressed_tensors", certified=False)
    return run


def test_a_served_run_from_start_to_end(run):
    arguments = [f"run={run}", "server.port=0", "engine.num_blocks=64", "engine.block_size=4", "threads=1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "qat", "serve", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        lines = []
        while not lines or "curl" not in lines[-1]:
            lines.append(process.stdout.readline())
            assert lines[-1], process.communicate()
        said = "".join(lines)
        match = re.search(r"Serving first at (http://127\.0\.0\.1:\d+/v1)", said)
        assert match, said
        assert "linears     8 by Int4Weight" in said
        assert "256 tokens (64 blocks of 4)" in said
        curl = shlex.split(lines[-1])
        url, headers = curl[1], dict([curl[curl.index("-H") + 1].split(": ")])
        response = httpx.post(url, content=curl[curl.index("-d") + 1], headers=headers, timeout=30)
        assert response.json()["usage"]["completion_tokens"] > 0
        body = {"model": "first", "prompt": "abc", "max_tokens": 100, "stream": True, "ignore_eos": True}
        with httpx.stream("POST", match[1] + "/completions", json=body, timeout=30) as response:
            pieces = response.iter_text()
            first = next(pieces)
            process.send_signal(signal.SIGTERM)
            text = first + "".join(pieces)
        assert text.endswith("data: [DONE]\n\n")
        assert '"finish_reason": "length"' in text
        _, errors = process.communicate(timeout=20)
        assert (process.returncode, errors) == (0, "")
    finally:
        process.kill()
        process.communicate()


def test_a_port_in_use_is_one_sentence_before_the_model_is_loaded(run, capsys, monkeypatch):
    monkeypatch.setattr(serve, "open_llm", lambda config: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(run / "export" / "compressed_tensors"), f"server.port={port}"]) == 1
    words = f"qat serve: server.port={port}: cannot be used on 127.0.0.1 (Address already in use); choose another\n"
    assert capsys.readouterr().err == words


def test_a_failed_engine_is_told_by_the_exit_status(run, monkeypatch):
    def fail():
        raise RuntimeError("illegal memory access")

    def open_llm(config):
        llm = serve_open_llm(config)
        llm.step = fail
        return llm

    serve_open_llm, statuses = serve.open_llm, []
    monkeypatch.setattr(serve, "open_llm", open_llm)
    with listen.bind("127.0.0.1", 0) as free:
        port = free.getsockname()[1]

    def ask():
        url = f"http://127.0.0.1:{port}"
        while not statuses:
            try:
                statuses.append(httpx.post(url + "/v1/completions", json={"model": "first", "prompt": "a"}).status_code)
            except httpx.ConnectError:
                time.sleep(0.02)
        statuses.append(httpx.get(url + "/health").status_code)
        os.kill(os.getpid(), signal.SIGTERM)

    asker = threading.Thread(target=ask, daemon=True)  # a server that never comes must not keep the tests alive
    asker.start()
    assert main(["serve", f"run={run}", f"server.port={port}", "engine.device=cpu"]) == 1
    asker.join()
    assert statuses == [500, 503]


@pytest.mark.parametrize("package", ["fastapi", "uvicorn"])
def test_without_the_extra(package, run, capsys, monkeypatch):
    def require(name, extra):
        if name == package:
            raise MissingExtra(f"{name} is not installed: pip install 'qat[{extra}]'")

    monkeypatch.setattr(serve, "require", require)
    assert main(["serve", f"run={run}"]) == 1
    assert capsys.readouterr().err == f"qat serve: {package} is not installed: pip install 'qat[serve]'\n"


def test_nothing_to_serve(tmp_path, capsys):
    assert main(["serve", f"runs={tmp_path}", "server.port=0"]) == 1
    assert "no run at" in capsys.readouterr().err


def test_names(run, tmp_path):
    assert serve.model_name(run / "export" / "compressed_tensors") == "first"
    (tmp_path / "latest").symlink_to(run)
    assert serve.model_name(tmp_path / "latest" / "export" / "compressed_tensors") == "first"
    (tmp_path / "export" / "mine").mkdir(parents=True)
    assert serve.model_name(tmp_path / "export" / "mine") == "mine"


def test_what_to_try_depends_on_the_tokenizer(run, tmp_path):
    """A chat, a text, or tokens, as the checkpoint allows."""
    path = run / "export" / "compressed_tensors"
    engine = {"_target_": "qat.engine.config.EngineConfig", "device": "cpu"}
    config = {"path": str(path), "threads": None, "engine": engine}
    llm = serve.open_llm(config)
    assert serve.example(llm)[0] == "chat/completions"
    llm.tokenizer.chat_template = None
    assert serve.example(llm) == ("completions", {"prompt": "Hello"})
    bare = tmp_path / "bare"
    bare.mkdir()
    for file in path.iterdir():
        if not file.name.startswith(("tokenizer", "chat_template")):
            (bare / file.name).write_bytes(file.read_bytes())
    llm = serve.open_llm(config | {"path": str(bare)})
    route, body = serve.example(llm)
    assert route == "completions"
    assert json.dumps(body) == '{"prompt": [1, 2, 3]}'
    assert llm.generate([body["prompt"]])
