"""qat serve: a checkpoint behind OpenAI's HTTP API."""

import json
import logging
import os
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate

from qat.cli.devices import by_device
from qat.cli.errors import require
from qat.cli.rundir import export_of
from qat.engine.llm import LLM


def main(config: dict[str, Any]) -> int:
    """Serves until SIGTERM or SIGINT; 1 if the engine failed on the way."""
    for package in ("fastapi", "uvicorn"):
        require(package, extra="serve")
    from qat.server import app, listen  # they import both

    wanted = config["server"]
    with listen.bind(wanted["host"], wanted["port"]) as bound:  # first: a model takes longer to load
        llm = open_llm(config)
        name = wanted["name"] or model_name(llm.path)
        served = app.create(llm, name, wanted["max_queue"])
        bound.listen()
        print("\n".join(banner(llm, name, listen.url(bound))), flush=True)
        listen.run(served, bound, wanted["drain_seconds"])
    return 1 if served.state.worker.failure else 0


def open_llm(config: dict[str, Any]) -> LLM:
    """The checkpoint that `path` or `run` names, in an engine.

    Raises:
        ValueError: There is none, or it cannot be served.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    path = Path(config["path"]).expanduser() if config["path"] else export_of(config["runs"], config["run"])
    wanted = config["engine"]["device"]
    cuda = torch.cuda.is_available() if wanted == "auto" else str(wanted).startswith("cuda")
    return LLM(path, instantiate(by_device(config["engine"], "cuda" if cuda else "cpu"), _convert_="all"))


def model_name(path: Path) -> str:
    """What clients call a checkpoint: the experiment of the run whose export it is, or else its directory's name."""
    path = path.resolve()
    run = path.parents[1] if path.parent.name == "export" else None
    return run.parent.name if run is not None and (run / "run.json").is_file() else path.name


def banner(llm: LLM, name: str, url: str) -> list[str]:
    """What is served, how, and a line to try."""
    blocks = llm.engine.blocks
    linears = ", ".join(f"{count} by {kernel}" for kernel, count in llm.kernels.items()) or "none is packed"
    route, prompt = example(llm)
    body = json.dumps({"model": name, **prompt, "max_tokens": 32})
    return [
        f"Serving {name} at {url}",
        f"  checkpoint  {llm.path}",
        f"  linears     {linears}",
        f"  KV cache    {blocks.num_tokens} tokens ({blocks.num_blocks} blocks of {blocks.block_size}), "
        f"{llm.engine.max_model_len} at most for one request",
        "Try:",
        f"  curl {url}/{route} -H 'Content-Type: application/json' -d '{body}'",
    ]


def example(llm: LLM) -> tuple[str, dict[str, Any]]:
    """A route that the checkpoint can answer on, and what to ask there."""
    try:
        chats = llm.tokenizer.chat_template is not None
    except ValueError:
        return "completions", {"prompt": [1, 2, 3]}
    if chats:
        return "chat/completions", {"messages": [{"role": "user", "content": "Hello"}]}
    return "completions", {"prompt": "Hello"}
