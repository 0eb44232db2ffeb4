"""qat generate: training text from the full-precision model itself, by our own engine.

LLM-QAT (arXiv:2305.17888, section 3.1) found that text which begins with a random token of the vocabulary, goes on with
the likeliest tokens for a few, and is then drawn from the model's own distribution, trains better than greedy text,
which repeats itself, and than text that is drawn from the start. So does each sequence here; or it begins with a piece
of a text (`prompt.path`), and the model goes on in the domain of that.
"""

import gc
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qat.cli.devices import by_device
from qat.cli.workbench import fingerprint, pick_device, quiet
from qat.data import generated
from qat.data.generated import Collection
from qat.data.text import load, tokenizer_digest
from qat.engine.config import EngineConfig, SamplingParams
from qat.engine.llm import LLM
from qat.engine.loader import ARCHITECTURES
from qat.engine.sampler import uniforms
from qat.formats.base import unquantized_state, write_directory
from qat.models import hf

BLOCK = 64  # tokens in a block of the cache: longer ones make shorter tables, and waste more of the last


def main(config: dict[str, Any]) -> int:
    """Makes the token directory `out`, or goes on with it."""
    quiet()
    device = pick_device(config["device"])
    config = by_device(config, device.type)
    if config["threads"]:
        torch.set_num_threads(config["threads"])
    out = Path(config["out"]).expanduser().absolute()
    path, digest, sha = teacher(config)
    kept = ("tokens", "length", "sequences", "seed", "sampling", "min_distinct", "splits")
    text, prompt = _text(config["prompt"], digest)
    settings = {"model": sha, "tokenizer": digest, "device": device.type, "prompt": prompt}
    settings |= {key: config[key] for key in kept}
    part = generated.begin(out, settings)
    if part is None:
        print(f"{out} is finished, with these settings")
        return _conclude(out)
    llm = LLM(path, _engine(config, str(device)))
    collection = Collection(config["tokens"], config["min_distinct"])
    gc.collect()
    gc.freeze()  # thousands of objects come and go in each step: the collector need not look at all others each time
    try:
        _fill(collection, part, llm, config, text)
    finally:
        gc.unfreeze()
    eos = llm.tokenizer.eos_token_id
    assert isinstance(eos, int)
    generated.finish(out, collection, settings, digest, eos)
    print(collection)
    for index, tokens in list(collection.sequences.items())[:2]:
        print(f"sequence {index}: {llm.tokenizer.decode(tokens[:60].tolist())!r} ...")
    return _conclude(out)


def teacher(config: dict[str, Any]) -> tuple[Path, str, str]:
    """The full-precision model as a directory that the engine serves, digest of its tokenizer, and its fingerprint.

    It is the model of the `fp` arm, rounded to the storage dtype; written once, and found by its fingerprint.
    """
    named, dtype = config["model"], getattr(torch, config["export"]["dtype"])
    model, tokenizer = hf.load(**named, dtype=dtype)
    if config["length"] > (limit := model.config.max_position_embeddings):
        raise ValueError(f"length={config['length']}: the model takes {limit} tokens at most")
    if (architecture := type(model).__name__) not in ARCHITECTURES:
        raise ValueError(f"model: the engine does not serve {architecture}; it has {', '.join(ARCHITECTURES)}")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos token; sequences are joined by it")
    digest, sha = tokenizer_digest(tokenizer), fingerprint(model, dtype)
    path = hf.cache_dir() / "models" / f"full-precision-{sha[:16]}-{digest[:8]}"
    if not (path / "config.json").is_file():
        write_directory(path, model, tokenizer, unquantized_state(model, {}, {}, dtype), None, dtype)
    return path, digest, sha


def sequences(
    llm: LLM, config: dict[str, Any], first: int, count: int, text: np.ndarray | None = None
) -> list[np.ndarray]:
    """Sequences `first` to `first + count - 1`, int32 `[<= length]` each, without the eos that ended them.

    Each is a function of model, settings and its index. A GPU rounds differently at another batch size, and a draw may
    then fall on another token; so equality to the bit is promised for the same `sequences` on the same hardware.

    Raises:
        ValueError: The engine could not go on with one, by its message.
    """
    if text is None:
        starts = start_tokens(llm, config["seed"], first, count)[:, None].tolist()
    else:
        starts = pieces(llm, text, config["prompt"]["tokens"], config["seed"], first, count).tolist()
    params = SamplingParams(max_tokens=config["length"] - len(starts[0]), **config["sampling"])
    said = {
        llm.engine.add_request(start, replace(params, seed=config["seed"] << 31 | index)): [*start]
        for index, start in enumerate(starts, first)
    }
    while llm.engine.has_unfinished():
        for event in llm.engine.step():
            if event.finish_reason == "error":
                raise ValueError(f"sequences={config['sequences']}: {event.message}; where memory is short, lower it")
            if event.token is not None and event.finish_reason != "stop":
                said[event.id].append(event.token)
    return [np.array(tokens, dtype=np.int32) for tokens in said.values()]


def start_tokens(llm: LLM, seed: int, first: int, count: int) -> np.ndarray:
    """What sequences begin with: the vocabulary without special tokens, shuffled anew whenever it has been used up.

    So no two of a round begin alike: after the greedy tokens that follow, they would be all the same.
    """
    known = min(len(llm.tokenizer), llm.loaded.config.vocab_size)
    words = np.setdiff1d(np.arange(known), llm.tokenizer.all_special_ids)
    found = [
        words[uniforms([~(seed << 31 | round)] * len(words), words.tolist()).argsort(stable=True).numpy()]
        for round in range(first // len(words), (first + count - 1) // len(words) + 1)
    ]
    place = first % len(words)
    return np.concatenate(found)[place : place + count]


def pieces(llm: LLM, text: np.ndarray, size: int, seed: int, first: int, count: int) -> np.ndarray:
    """What sequences begin with, `[count, size]`: pieces of a text that no document ends in, drawn with replacement.

    Raises:
        ValueError: No document is so long.
    """
    ends = np.concatenate([[0], np.cumsum(text == llm.tokenizer.eos_token_id)])
    whole = np.flatnonzero(ends[size:] == ends[:-size])
    if not len(whole):
        raise ValueError(f"prompt.tokens={size}: no document of the train split of prompt.path is so long; use fewer")
    draws = uniforms([~(seed << 31)] * count, range(first, first + count)).numpy()
    return text[whole[(draws * len(whole)).astype(np.int64)][:, None] + np.arange(size)]


def _text(prompt: dict[str, Any], tokenizer: str) -> tuple[np.ndarray | None, dict[str, Any] | None]:
    """The text that sequences begin with pieces of, and what the settings say of it; None and None without."""
    if prompt["path"] is None:
        return None, None
    tokens = load(Path(prompt["path"]).expanduser())
    if tokens.tokenizer != tokenizer:
        raise ValueError(f"prompt.path: {prompt['path']} was made with another tokenizer; prepare it with the model's")
    return np.asarray(tokens.streams["train"]), {"data": tokens.fingerprint, "tokens": prompt["tokens"]}


def _fill(collection: Collection, part: Path, llm: LLM, config: dict[str, Any], text: np.ndarray | None) -> None:
    """Takes the shards that are there, and makes more until there is enough text."""
    for shard in generated.shards(part):
        collection.extend(shard)
    if collection.num_seen:
        print(f"resumed after {collection.num_seen} sequences", flush=True)
    start, said = time.perf_counter(), 0
    while not collection.full:
        first, before = collection.num_seen, collection.num_tokens
        count = min(config["sequences"], collection.expected(config["length"]))
        shard = sequences(llm, config, first, count, text)
        generated.save_shard(part, first, shard)
        collection.extend(shard)
        if collection.num_tokens == before:
            raise ValueError(
                f"none of sequences {first} to {first + count - 1} is new and free of loops ({collection}); raise "
                f"sampling.temperature, or lower min_distinct"
            )
        said += sum(map(len, shard))
        rate = said / (time.perf_counter() - start)
        print(f"{collection.num_tokens} of {config['tokens']} tokens, {rate:.0f} tokens/s", flush=True)


def _engine(config: dict[str, Any], device: str) -> EngineConfig:
    """All sequences of a batch at once, from the first token to the last."""
    count, length = config["sequences"], config["length"]
    return EngineConfig(
        block_size=BLOCK,
        num_blocks=count * -(-length // BLOCK),
        max_num_seqs=count,
        max_num_batched_tokens=count,
        max_model_len=length,
        device=device,
    )


def _conclude(out: Path) -> int:
    tokens = load(out)
    print(f"{out}: { ({split: len(stream) for split, stream in tokens.streams.items()}) }, {tokens.fingerprint[:12]}")
    if empty := [split for split, stream in tokens.streams.items() if not len(stream)]:
        print(f"Nothing is in {' and '.join(empty)}, so no run can be judged on it: make more, with a larger tokens=")
        return 0
    print(f"Next:\n  qat run data=generated data.path={os.path.relpath(out)}")
    return 0
