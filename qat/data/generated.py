"""Text that a model said, as a token directory: LLM-QAT's data (arXiv:2305.17888, section 3.1), or any other sampler's.

A directory `out` is complete or not there. While it is being made, `.out.part` holds `settings.json` and one file for
each batch of sequences, named by the index of its first one. What is kept depends on the sequences and their order
alone, so a directory that was finished after an interruption is the one that an unbroken run makes.
"""

import hashlib
import json
import math
import shutil
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qat.data.sources import SPLITS
from qat.data.text import load, save

NGRAM = 4
SPARE = 1.25  # a short batch takes as many steps as a full one, so the last one had better be enough
SETTINGS = "settings.json"


class Collection:
    """The sequences that are kept, in the order of their index, until there are enough.

    A sequence equal to an earlier one is dropped, and one that loops. Kept ones count one token more, for eos.

    Args:
        tokens: Enough; the last sequence may exceed it.
        min_distinct: Least `distinct_share` of a sequence that does not loop. The most repetitive of all windows of
            512 tokens of `python_docs`, a table, has 0.32.

    Attributes:
        sequences: Index to tokens, int32.
        num_tokens: In all that are kept.
        duplicates: Dropped because they were there already.
        degenerate: Dropped because they loop.
    """

    def __init__(self, tokens: int, min_distinct: float):
        self.tokens, self.min_distinct = tokens, min_distinct
        self.sequences: dict[int, np.ndarray] = {}
        self.num_seen = self.num_tokens = self.duplicates = self.degenerate = 0
        self._hashes: set[bytes] = set()

    @property
    def full(self) -> bool:
        """Whether there are enough."""
        return self.num_tokens >= self.tokens

    def __str__(self) -> str:
        dropped = f"dropped {self.duplicates} duplicates and {self.degenerate} that loop"
        return f"{len(self.sequences)} sequences, {self.num_tokens} tokens; {dropped}"

    def extend(self, sequences: Iterable[np.ndarray]) -> None:
        """Takes the next sequences, up to the one that is enough."""
        for sequence in sequences:
            if not self.full:
                self._add(sequence)

    def _add(self, sequence: np.ndarray) -> None:
        index = self.num_seen
        self.num_seen += 1
        key = hashlib.sha256(np.ascontiguousarray(sequence, dtype="<i4").data).digest()
        if key in self._hashes:
            self.duplicates += 1
            return
        self._hashes.add(key)
        if distinct_share(sequence) < self.min_distinct:
            self.degenerate += 1
            return
        self.sequences[index] = sequence
        self.num_tokens += len(sequence) + 1

    def expected(self, length: int) -> int:
        """How many more sequences of at most `length` tokens are enough, going by those before, and a few to spare."""
        mean = self.num_tokens / self.num_seen if self.num_tokens else length
        return math.ceil(SPARE * (self.tokens - self.num_tokens) / mean)


def distinct_share(sequence: np.ndarray) -> float:
    """Distinct 4-grams of a sequence over all of them: 1 says nothing twice, a loop goes to 0; 1 if it has none."""
    tokens = sequence.tolist()
    count = len(tokens) - NGRAM + 1
    return len(set(zip(*(tokens[i:] for i in range(NGRAM)), strict=False))) / count if count > 0 else 1.0


def split_of(index: int, validation: float, test: float) -> str:
    """The split of a sequence: a pure function of its index, by the SHA-256 of it."""
    u = int.from_bytes(hashlib.sha256(str(index).encode()).digest()[:4], "big") / 2**32
    return "test" if u < test else "validation" if u < test + validation else "train"


def begin(out: Path, settings: dict[str, Any]) -> Path | None:
    """Opens the work on a directory, new or interrupted: where its shards lie. None if it is finished.

    Args:
        out: The directory to make.
        settings: Everything that decides its tokens, JSON.

    Raises:
        ValueError: The directory or the work on it has other settings, or the directory is something else.
    """
    part = _part(out)
    if out.exists() and any(out.iterdir()):
        found = _read(out / "manifest.json").get("source") or {}
        if found.get("source") != "generated":
            raise ValueError(f"out={out}: holds something else; name an empty or new directory")
        _check(out, found["settings"], settings)
        load(out)  # raises if it is damaged
        shutil.rmtree(part, ignore_errors=True)
        return None
    if (part / SETTINGS).exists():
        _check(part, _read(part / SETTINGS), settings)
    part.mkdir(parents=True, exist_ok=True)
    writing = part / f".{SETTINGS}"
    writing.write_text(json.dumps(settings, indent=1), encoding="utf-8")
    writing.replace(part / SETTINGS)
    return part


def save_shard(part: Path, first: int, sequences: Sequence[np.ndarray]) -> None:
    """Keeps sequences `first`, `first + 1`, ...: whole or not at all."""
    lengths, tokens = np.array([len(s) for s in sequences]), np.concatenate(sequences)
    file = part / f"{first:010}.npz"
    writing = part / f".{file.name}"
    np.savez(writing, lengths=lengths, tokens=tokens)
    writing.replace(file)


def shards(part: Path) -> Iterator[list[np.ndarray]]:
    """The sequences of each shard that is there, from index 0.

    Raises:
        ValueError: A shard is damaged or missing; the message says which to delete.
    """
    after = 0
    for file in sorted(part.glob("[0-9]*.npz")):
        try:
            with file.open("rb") as handle, np.load(handle, allow_pickle=False) as content:
                lengths, tokens = content["lengths"], content["tokens"]
            whole = int(file.stem) == after and int(lengths.sum()) == len(tokens)
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            whole = False
        if not whole:
            raise ValueError(f"{file}: damaged, or the one before it is missing; delete it and all after it")
        after += len(lengths)
        yield np.split(tokens, lengths.cumsum()[:-1])


def finish(out: Path, collection: Collection, settings: dict[str, Any], tokenizer: str, eos: int) -> None:
    """Writes the token directory and removes the shards.

    Args:
        out: The directory, as `begin` had it.
        collection: Full.
        settings: As `begin` had them; `splits` gives the shares of validation and test.
        tokenizer: Digest of the tokenizer.
        eos: Ends each sequence.
    """
    parts: dict[str, list[np.ndarray]] = {split: [] for split in SPLITS}
    end = np.array([eos], dtype=np.int32)
    for index, sequence in collection.sequences.items():
        parts[split_of(index, **settings["splits"])] += [sequence, end]
    streams = {split: np.concatenate([*arrays, end[:0]]) for split, arrays in parts.items()}
    counts = {
        "sequences": len(collection.sequences),
        "duplicates": collection.duplicates,
        "degenerate": collection.degenerate,
    }
    save(out, streams, {"source": "generated", "settings": settings, "counts": counts}, tokenizer)
    shutil.rmtree(_part(out))


def _part(out: Path) -> Path:
    return out.with_name(f".{out.name}.part")


def _check(where: Path, found: dict[str, Any], settings: dict[str, Any]) -> None:
    wanted: dict[str, Any] = json.loads(json.dumps(settings))
    if strays := sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key)):
        key = strays[0]
        raise ValueError(
            f"{where}: made with {key}={found.get(key)!r}, not {wanted.get(key)!r}; name another directory with out=, "
            f"or delete this one"
        )


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
