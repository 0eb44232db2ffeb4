"""A tiny packed checkpoint, and a real server of it on a real socket."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import httpx
import openai
import pytest
from fastapi import FastAPI
from tiny_export import export

from qat.engine.config import EngineConfig
from qat.engine.llm import LLM
from qat.server import listen
from qat.server.app import create


@dataclass
class Serving:
    """A server that runs.

    Attributes:
        url: Of the API, with /v1.
        llm: What it serves.
        app: Its application.
        server: Uvicorn's.
        thread: Where it runs.
    """

    url: str
    llm: LLM
    app: FastAPI
    server: listen.Server
    thread: threading.Thread

    @cached_property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=30)

    @cached_property
    def http(self) -> httpx.Client:
        return httpx.Client(base_url=self.url, timeout=30, verify=False)  # certificates take long to load

    def close(self) -> None:
        self.client.close()
        self.http.close()

    def wait_until_free(self, seconds: float = 10) -> None:
        """Until no block is held; then nothing may be lost."""
        deadline = time.monotonic() + seconds
        while (stats := self.llm.engine.stats())["free_blocks"] < stats["blocks"] or stats["waiting"]:
            assert time.monotonic() < deadline, stats
            time.sleep(0.005)
        self.llm.check_integrity()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("served") / "tiny"
    export(path, certified=False)
    return path


@pytest.fixture(scope="session")
def build(checkpoint: Path) -> Callable[..., LLM]:
    """`build(**engine)`: an LLM of the checkpoint."""
    return lambda **engine: LLM(checkpoint, EngineConfig(device="cpu", **({"block_size": 4} | engine)))


@contextmanager
def running(llm: LLM, max_queue: int = 16, drain_seconds: float = 10) -> Iterator[Serving]:
    app = create(llm, "tiny", max_queue)
    bound = listen.bind("127.0.0.1", 0)
    url = listen.url(bound)
    server = listen.Server(app, drain_seconds)
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.005)
    serving = Serving(url, llm, app, server, thread)
    try:
        yield serving
    finally:
        serving.close()
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive()
        bound.close()


@pytest.fixture(scope="session")
def serve(build: Callable[..., LLM]) -> Callable:
    """`with serve(max_queue=..., drain_seconds=..., **engine) as serving`."""

    def start(max_queue: int = 16, drain_seconds: float = 10, **engine: int):
        return running(build(**engine), max_queue, drain_seconds)

    return start


@pytest.fixture(scope="module")
def serving(serve: Callable) -> Iterator[Serving]:
    """One server for all tests of a file that leave it as it was."""
    with serve() as serving:
        yield serving


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`slow(llm, seconds)`: each of its steps takes longer."""

    def wait(llm: LLM, seconds: float = 0.01) -> None:
        step = llm.step

        def stepped():
            time.sleep(seconds)
            return step()

        monkeypatch.setattr(llm, "step", stepped)

    return wait
