"""Where text comes from: the hub, local files, and what every CPython carries.

A source is a value with `documents(count)`, which returns the documents of each split it has; `count` tells how many
tokens a text has, for sources that cut their own splits.
"""

import ast
import glob
import hashlib
import re
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

Documents = dict[str, list[str]]  # split -> documents
SPLITS = ("train", "validation", "test")
FEW = 100  # documents: of fewer, a part of one in twenty may well be empty
READERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet"}


@dataclass(frozen=True)
class PythonDocs:
    """The language reference in `pydoc_data.topics`, and for training the standard library's docstrings as well.

    Topics quote each other. Those that share a paragraph of more than 80 characters form a unit, and units never
    straddle splits: the largest trains; units of fewer than 4500 tokens, in the order of the SHA-256 of their names,
    fill test to 12 288 tokens, then validation to 4096; the rest trains. Training paragraphs are deduplicated, and
    those of test and validation are left out.
    """

    test_tokens: int = 12_288
    validation_tokens: int = 4_096
    unit_tokens: int = 4_500

    def documents(self, count: Callable[[str], int]) -> Documents:
        """One document for each topic, and one for each module's docstrings."""
        from pydoc_data.topics import topics

        units = _units(topics)
        sizes = {name: sum(count(topics[t]) + 1 for t in members) for name, members in units.items()}
        largest = max(sizes, key=lambda name: (sizes[name], name))
        chosen: dict[str, list[str]] = {split: [] for split in SPLITS}
        filled = {"test": 0, "validation": 0}
        for name in sorted(units, key=lambda n: hashlib.sha256(n.encode()).hexdigest()):
            split = "train"
            if name != largest and sizes[name] < self.unit_tokens:
                if filled["test"] < self.test_tokens:
                    split = "test"
                elif filled["validation"] < self.validation_tokens:
                    split = "validation"
            if split != "train":
                filled[split] += sizes[name]
            chosen[split] += units[name]
        held_out = {p for split in ("test", "validation") for t in chosen[split] for p in paragraphs(topics[t])}
        train = [topics[t] for t in chosen["train"]] + list(_docstrings())
        return {
            "train": list(_deduplicated(train, held_out)),
            "validation": [topics[t] for t in chosen["validation"]],
            "test": [topics[t] for t in chosen["test"]],
        }


@dataclass(frozen=True)
class LocalFiles:
    """Text files, or a column of JSON, JSONL or parquet files.

    A document is a row, or in `.txt` files a file. Splits that have no files of their own are cut from train, by the
    SHA-256 of the document, so that equal documents never straddle splits: one in twenty each for test and validation.
    Too few documents to cut are cut into their paragraphs, at blank lines.

    Attributes:
        train: A path or a glob pattern.
        validation: Likewise, or None.
        test: Likewise, or None.
        column: The column that holds the text.
    """

    train: str
    validation: str | None = None
    test: str | None = None
    column: str = "text"

    def documents(self, count: Callable[[str], int]) -> Documents:
        """Documents of each split."""
        named = {split: pattern for split in SPLITS if (pattern := getattr(self, split)) is not None}
        splits = {split: _read_files(pattern, self.column) for split, pattern in named.items()}
        if len(splits) < len(SPLITS) and len(splits["train"]) < FEW:
            splits["train"] = [p for document in splits["train"] for p in re.split(r"\n\s*\n", document) if p.strip()]
        found = cut(splits)
        if empty := [split for split in SPLITS if not found[split]]:
            raise ValueError(
                f"data.source.train={self.train}: {len(splits['train'])} documents or paragraphs, too few to cut "
                f"{' and '.join(empty)} from them; name files with data.source.{empty[-1]}=, or bring more text"
            )
        return found


@dataclass(frozen=True)
class Hub:
    """A data set of the Hugging Face hub, with the splits that it has; missing ones are cut as `LocalFiles` cuts them.

    Attributes:
        name: Repository, e.g. `Salesforce/wikitext`.
        config: Name of its configuration, or None.
        revision: Branch, tag or commit.
        column: The column that holds the text.
        join: Joins the rows of a split into one document (WikiText has a row for each line); None: a row is a document.
    """

    name: str
    config: str | None = None
    revision: str | None = None
    column: str = "text"
    join: str | None = None

    def documents(self, count: Callable[[str], int]) -> Documents:
        """Documents of each split."""
        import datasets

        try:
            loaded = datasets.load_dataset(self.name, self.config, revision=self.revision)
        except (OSError, ValueError, RuntimeError) as error:
            first = str(error).strip().splitlines()[0]
            raise ValueError(
                f"data.source.name={self.name}: not found, or no network to fetch it ({first}); use data=text with "
                f"local files, or data.path with prepared tokens"
            ) from error
        splits = {split: _column(loaded[split], self.column, self.name) for split in SPLITS if split in loaded}
        if "train" not in splits:
            raise ValueError(f"data.source.name={self.name}: no train split; it has {', '.join(loaded)}")
        if self.join is not None:
            splits = {split: [self.join.join(rows)] for split, rows in splits.items()}
        return cut(splits)


Source = PythonDocs | LocalFiles | Hub


def paragraphs(text: str) -> set[str]:
    """The paragraphs of more than 80 characters of a text, with white space folded."""
    folded = (" ".join(p.split()) for p in text.split("\n\n"))
    return {p for p in folded if len(p) > 80}


def cut(splits: Documents) -> Documents:
    """Fills missing splits from train, by the hash of each document."""
    missing = [split for split in ("validation", "test") if split not in splits]
    result: Documents = {"train": [], "validation": [], "test": []} | splits
    if missing:
        result["train"] = []
        for document in splits["train"]:
            bucket = int(hashlib.sha256(document.encode()).hexdigest(), 16) % 20
            split = missing[bucket] if bucket < len(missing) else "train"
            result[split].append(document)
    return result


def _read_files(pattern: str, column: str) -> list[str]:
    import datasets

    files = sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))
    if not files:
        raise ValueError(f"data.source: no file matches {pattern}")
    suffixes = sorted({Path(f).suffix for f in files})
    suffix = suffixes[0]
    if len(suffixes) > 1 or suffix not in READERS:
        raise ValueError(f"data.source: {pattern} names {', '.join(suffixes)} files; one of {', '.join(READERS)}")
    if suffix == ".txt":
        return [text for f in files if (text := _text(f))]
    rows = datasets.load_dataset(READERS[suffix], data_files=files, split="train")
    return _column(rows, column, pattern)


def _text(file: str) -> str:
    try:
        return Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"data.source: {file} is not UTF-8 text ({error})") from None


def _column(rows: Iterable, column: str, where: str) -> list[str]:
    names = rows.column_names  # type: ignore[attr-defined]
    if column not in names:
        raise ValueError(f"data.source: {where} has no column {column!r}; it has {', '.join(names)}")
    return [text for text in rows[column] if text]  # type: ignore[index]


def _units(topics: dict[str, str]) -> dict[str, list[str]]:
    root = {name: name for name in topics}

    def find(name: str) -> str:
        while root[name] != name:
            name = root[name]
        return name

    first: dict[str, str] = {}
    for name in sorted(topics):
        for paragraph in sorted(paragraphs(topics[name])):
            owner = find(first.setdefault(paragraph, name))
            mine = find(name)
            root[max(owner, mine)] = min(owner, mine)
    units: dict[str, list[str]] = {}
    for name in sorted(topics):
        units.setdefault(find(name), []).append(name)
    return units


def _docstrings() -> Iterable[str]:
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        try:
            tree = ast.parse(file.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
        if text := "\n\n".join(doc for doc in found if doc and len(doc) > 80):
            yield text


def _deduplicated(documents: Iterable[str], held_out: set[str]) -> Iterable[str]:
    seen = set(held_out)
    for document in documents:
        kept = []
        for paragraph in document.split("\n\n"):
            folded = " ".join(paragraph.split())
            if len(folded) <= 80 or folded not in seen:
                kept.append(paragraph)
                if len(folded) > 80:
                    seen.add(folded)
        if kept:
            yield "\n\n".join(kept)
