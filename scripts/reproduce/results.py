"""A results file that several processes fill: changed under a lock, replaced as a whole, one row to a line."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

Row = dict[str, Any]


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """While open, no other process has the lock of this name; it dies with the process."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def read(file: Path) -> dict[str, Any]:
    """What the file holds; at first `meta` and no rows."""
    if not file.exists():
        return {"meta": {}, "rows": []}
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def write(file: Path, content: dict[str, Any]) -> None:
    """Replaces the file; lists of rows have a line for each."""
    file.parent.mkdir(parents=True, exist_ok=True)
    parts = []
    for key, value in content.items():
        lines = ",\n".join(json.dumps(row) for row in value) if isinstance(value, list) else None
        parts.append(f"{json.dumps(key)}: " + (json.dumps(value, indent=1) if lines is None else f"[\n{lines}\n]"))
    part = file.with_name(f".{file.name}.part")
    part.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    part.replace(file)
