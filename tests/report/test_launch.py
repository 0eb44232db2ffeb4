"""What is written can be parsed by who reads it, and finds the checkpoint wherever it lies."""

import ast
import subprocess
import sys
import types

import pytest
import yaml

from qat.report.launch import RAY, SGLANG, VLLM, Launch, files

LAUNCH = Launch("some-model-w4", "bfloat16", 8192)


@pytest.fixture
def checkpoint(tmp_path):
    for path, text in files(LAUNCH, ["vllm", "sglang"]).items():
        (tmp_path / "a b" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a b" / path).write_text(text)
    return tmp_path / "a b"


def test_vllm_reads_keys_of_its_command_line_and_the_directory_is_relative(checkpoint):
    assert yaml.safe_load((checkpoint / VLLM).read_text()) == {
        "model": ".",
        "served-model-name": "some-model-w4",
        "dtype": "bfloat16",
        "max-model-len": 8192,
        "host": "127.0.0.1",
        "port": 8000,
    }


def test_ray_is_told_the_directory_above(checkpoint, monkeypatch):
    """Ray is not here: what the file gives to it is recorded."""
    given = {}
    ray, llm = types.ModuleType("ray"), types.ModuleType("ray.serve.llm")
    ray.serve = types.SimpleNamespace(run=lambda app, blocking: given.update(app=app, blocking=blocking))
    llm.LLMConfig = lambda **settings: settings
    llm.build_openai_app = lambda args: args
    for name, module in {"ray": ray, "ray.serve": types.ModuleType("ray.serve"), "ray.serve.llm": llm}.items():
        monkeypatch.setitem(sys.modules, name, module)
    code = compile((checkpoint / RAY).read_text(), str(checkpoint / RAY), "exec")
    exec(code, {"__name__": "__main__", "__file__": str(checkpoint / RAY)})
    (config,) = given["app"]["llm_configs"]
    assert config["model_loading_config"] == {"model_id": "some-model-w4", "model_source": str(checkpoint)}
    assert config["engine_kwargs"] == {"dtype": "bfloat16", "max_model_len": 8192}
    assert given["blocking"]


def test_sglang_gets_the_directory_above_and_more_arguments(checkpoint, tmp_path):
    bin = tmp_path / "bin"
    bin.mkdir()
    (bin / "python").write_text('#!/bin/sh\nfor a in "$@"; do echo "$a"; done\n')
    (bin / "python").chmod(0o755)
    command = ["sh", str(checkpoint / SGLANG), "--tp", "2"]
    result = subprocess.run(command, env={"PATH": f"{bin}:/usr/bin:/bin"}, capture_output=True, text=True, check=True)
    words = result.stdout.splitlines()
    assert words[:4] == ["-m", "sglang.launch_server", "--model-path", str(checkpoint)]
    assert words[4:] == [
        *("--served-model-name", "some-model-w4", "--dtype", "bfloat16", "--context-length", "8192"),
        *("--host", "127.0.0.1", "--port", "30000", "--tp", "2"),
    ]


def test_only_what_was_asked_for_is_written():
    assert set(files(LAUNCH, ["vllm"])) == {VLLM, RAY}
    assert set(files(LAUNCH, ["sglang"])) == {SGLANG}
    assert files(LAUNCH, []) == {}
    assert ast.parse(files(LAUNCH, ["vllm"])[RAY])
