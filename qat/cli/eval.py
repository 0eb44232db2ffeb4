"""qat eval: a checkpoint on held-out windows, beside the full precision of a run."""

import json
import math
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.utils import instantiate

from qat.cli.devices import by_device
from qat.cli.rundir import export_of, find
from qat.cli.workbench import cast, pick_device, quiet
from qat.data.text import Tokens, prepare
from qat.engine.loader import open_checkpoint
from qat.evaluation.divergence import evaluate, mean, standard_error
from qat.formats.base import unquantized_state
from qat.models import hf
from qat.numerics.scheme import is_input_scale
from qat.surgery.convert import apply


def main(config: dict[str, Any]) -> int:
    """Prints one JSON object, and appends it to the run's `evaluations.jsonl`."""
    quiet()
    if config["path"]:
        run, path = find(config["runs"], config["run"]), Path(config["path"]).expanduser()
    else:
        path = export_of(config["runs"], config["run"])
        run = path.parents[1]
    device = pick_device(config["device"])
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    settings = by_device(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8")), device.type)
    sizes = settings["evaluation"] | {key: value for key, value in config["evaluation"].items() if value is not None}
    checkpoint = open_checkpoint(path)
    named = settings["model"]
    storage = getattr(torch, settings["export"]["dtype"])
    model, tokenizer = hf.load(**named, dtype=storage)
    if model.config.vocab_size != checkpoint.config["vocab_size"]:
        raise ValueError(f"{path}: vocabulary {checkpoint.config['vocab_size']}, the run's {model.config.vocab_size}")
    whole = set(unquantized_state(model, {}, {}, storage))
    plain = {name for name in checkpoint.plain if not is_input_scale(name)}
    if strays := sorted(whole ^ ({f"{name}.weight" for name in checkpoint.tensors} | plain)):
        raise ValueError(f"{path}: not a checkpoint of the run's model; one of them lacks {strays[0]}")
    data = settings["data"]  # only train has extra tokens
    tokens = prepare(instantiate(data["source"], _convert_="all"), tokenizer, hf.cache_dir() / "tokens", data["path"])
    count = count_of(tokens, config["split"], sizes, config["evaluation"]["windows"] is None)
    windows = tokens.windows(config["split"], sizes["seq_len"], count)
    if device.type == "cuda":
        model = cast(model, torch.bfloat16).to(device)
    graph = apply(model, dict(checkpoint.tensors), dict(checkpoint.plain), recipe=checkpoint.recipe)
    scores = evaluate(graph, windows, model, sizes["batch_size"])
    assert scores.kl is not None
    assert scores.agree is not None
    nll = mean(scores.nll, scores.tokens)
    row = {
        "path": str(path),
        "split": config["split"],
        "data": tokens.fingerprint,
        "dtype": "float32" if device.type == "cpu" else "bfloat16",
        "seq_len": sizes["seq_len"],
        "tokens": scores.tokens * len(scores.nll),
        "ppl": math.exp(nll),
        "nll": nll,
        "kl": mean(scores.kl, scores.tokens),
        "kl_se": standard_error(scores.kl, scores.tokens),
        "top1_agree": mean(scores.agree, scores.tokens),
    }
    with (run / "evaluations.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=1))
    return 0


def count_of(tokens: Tokens, split: str, sizes: dict[str, Any], inherited: bool) -> int | None:
    """How many windows are judged: as many as asked for; of the run's own number, as many as a shorter split has.

    None, the whole split, stays what it is.
    """
    count: int | None = sizes["windows"]
    if count is None or not inherited:
        return count
    return min(count, len(tokens.streams[split]) // sizes["seq_len"])
