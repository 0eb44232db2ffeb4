"""Text becomes tokens once: tokenized, packed, split, fingerprinted, and kept in a directory that can be carried.

A token directory holds `train.npy`, `validation.npy`, `test.npy` (one int32 stream each: documents, each followed by
eos; no BOS) and `manifest.json`. Windows are cut from a stream without overlap; what is left over is not used.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qat.data.sources import SPLITS, Source

BATCH = 256  # documents handed to the tokenizer at once


@dataclass(frozen=True)
class Tokens:
    """A prepared token directory, memory-mapped.

    Attributes:
        path: The directory.
        fingerprint: SHA-256 over the streams: two runs with the same one saw the same tokens.
        tokenizer: Digest of the vocabulary that made them.
        streams: Split to int32 stream.
    """

    path: Path
    fingerprint: str
    tokenizer: str
    streams: dict[str, np.ndarray]

    def windows(self, split: str, seq_len: int, limit: int | None = None) -> Tensor:
        """The first `limit` windows of a split (all, if None): int64 `[n, seq_len]`.

        Raises:
            ValueError: The split holds no whole window, or fewer than `limit`.
        """
        stream = self.streams[split]
        have = len(stream) // seq_len
        if have < max(limit or 1, 1):
            raise ValueError(
                f"{self.path}: split {split} has {len(stream)} tokens, {have} windows of {seq_len}; "
                f"{limit or 1} asked for. Lower the sequence length or the number of windows, or prepare more text"
            )
        count = have if limit is None else limit
        return torch.from_numpy(np.array(stream[: count * seq_len], dtype=np.int64)).view(count, seq_len)


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identity of a tokenizer for our purpose: its vocabulary, and how it cuts a probe text."""
    probe = "The quick brown fox;\n\tdef f(x): return x**2  # naïve 東京 🙂"
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    content = json.dumps([vocabulary, tokenizer(probe, add_special_tokens=False)["input_ids"]])
    return hashlib.sha256(content.encode()).hexdigest()


def prepare(
    source: Source | None,
    tokenizer: PreTrainedTokenizerBase,
    cache: Path,
    path: str | None = None,
    extra: Sequence[str] = (),
) -> Tokens:
    """The tokens of a source, prepared now or found in the cache.

    Args:
        source: Where text comes from; None: from `path`.
        tokenizer: Its eos ends each document.
        cache: A directory in which prepared tokens are kept.
        path: A directory prepared earlier, here or elsewhere; the source is then not read.
        extra: More such directories: their train splits go on where the train split ends. Their other splits are not
            used, so what is judged stays what it was.

    Raises:
        ValueError: A directory was made with another tokenizer or is damaged, the tokenizer has no eos, the training
            split is empty, or there is neither source nor path.
    """
    digest = tokenizer_digest(tokenizer)
    tokens = _prepared(source, tokenizer, digest, cache) if path is None else _opened("data.path", path, digest)
    if not extra:
        return tokens
    trains = [_opened("data.extra", more, digest).streams["train"] for more in extra]
    streams = tokens.streams | {"train": np.concatenate([tokens.streams["train"], *trains])}
    return Tokens(tokens.path, fingerprint(streams), digest, streams)


def _opened(key: str, path: str, digest: str) -> Tokens:
    tokens = load(Path(path).expanduser())
    if tokens.tokenizer != digest:
        raise ValueError(f"{key}={path}: made with another tokenizer than this model's; prepare it again")
    return tokens


def _prepared(source: Source | None, tokenizer: PreTrainedTokenizerBase, digest: str, cache: Path) -> Tokens:
    if source is None:
        raise ValueError("data.path: null; `qat generate out=DIR` makes a directory of tokens for it")
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no eos token; documents are joined by it")

    def count(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    documents = source.documents(count)
    key = hashlib.sha256(json.dumps([type(source).__name__, asdict(source), digest, documents]).encode()).hexdigest()
    target = cache / f"{type(source).__name__.lower()}-{key[:16]}"
    if not (target / "manifest.json").is_file():
        streams = {split: encode(documents[split], tokenizer) for split in SPLITS}
        if not len(streams["train"]):
            raise ValueError(f"data.source {source}: the training split is empty")
        save(target, streams, {"source": type(source).__name__, **asdict(source)}, digest)
    return load(target)


def encode(documents: list[str], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """One int32 stream: each document, followed by eos."""
    parts: list[int] = []
    for i in range(0, len(documents), BATCH):
        for ids in tokenizer(documents[i : i + BATCH], add_special_tokens=False, verbose=False)["input_ids"]:
            parts += [*ids, tokenizer.eos_token_id]
    return np.asarray(parts, dtype=np.int32)


def load(path: Path) -> Tokens:
    """Opens a token directory.

    Raises:
        ValueError: It is missing, incomplete, or its streams are not those that it was made with.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        streams = {split: _stream(path / f"{split}.npy") for split in SPLITS}
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: not a directory of prepared tokens ({error})") from None
    known = [manifest.get(key) for key in ("fingerprint", "tokenizer")] if isinstance(manifest, dict) else [None]
    if not all(isinstance(value, str) for value in known):
        raise ValueError(f"{path}: manifest.json names no fingerprint or no tokenizer; copy it again")
    if (found := fingerprint(streams)) != manifest["fingerprint"]:
        raise ValueError(f"{path}: the tokens are not those that were prepared ({found[:12]}); copy it again")
    return Tokens(path, found, manifest["tokenizer"], streams)


def _stream(file: Path) -> np.ndarray:
    try:
        stream = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file}: {error}") from None
    if not isinstance(stream, np.ndarray) or stream.dtype != np.int32 or stream.ndim != 1:
        raise ValueError(f"{file}: not one stream of int32")
    return stream


def fingerprint(streams: dict[str, np.ndarray]) -> str:
    """SHA-256 over the streams of all splits."""
    sha = hashlib.sha256()
    for split in SPLITS:
        sha.update(f"{split} {len(streams[split])} ".encode())
        sha.update(np.ascontiguousarray(streams[split], dtype="<i4").data)
    return sha.hexdigest()


def save(target: Path, streams: dict[str, np.ndarray], source: dict[str, Any], digest: str) -> None:
    """Writes a token directory, whole or not at all; one that lies there is replaced.

    Args:
        target: The directory.
        streams: Split to int32 stream.
        source: Where the tokens come from, JSON; it goes into the manifest.
        digest: Of the tokenizer: `tokenizer_digest`.
    """
    part = target.with_name(f".{target.name}.{os.getpid()}")
    part.mkdir(parents=True, exist_ok=True)
    for split, stream in streams.items():
        np.save(part / f"{split}.npy", stream, allow_pickle=False)
    sizes = {split: len(stream) for split, stream in streams.items()}
    manifest = {"source": source, "tokens": sizes, "fingerprint": fingerprint(streams), "tokenizer": digest}
    (part / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    shutil.rmtree(target, ignore_errors=True)
    part.rename(target)
