"""Which cells the quality table has, how each is made, and who makes it: none twice, none before what it needs."""

import fcntl
import hashlib
import json
import os
from argparse import Namespace
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from results import Row, locked, read, write

from qat.cli.tree import Tree
from qat.cli.validate import validate
from qat.cli.verbs import VERBS

PTQ = ("rtn", "mse_rtn", "gptq", "awq", "autoround")
DISTILLED = ("qat", "blockap_qat")
DOCS = 4  # times the train split of python_docs beside the generated text, which is nearly twenty times its size
TRAINED = ("ft_fp", "blockap", *DISTILLED, "qat_ce")
ARMS = ("fp", *TRAINED, *PTQ, "ft_gptq")
NEEDS = {"ft_gptq": "ft_fp", "blockap_qat": "blockap"}
EVERYWHERE = ("fp", "ft_fp")  # the same for every recipe, "-"
DRAWN = (*TRAINED, "gptq", "awq", "autoround", "ft_gptq")  # they depend on the seed; the others have seed 0

RECIPES: dict[str, list[str]] = {  # the first three tuned on the validation split, the others set beside them
    "w4a16_g64": ["optim.lr=2e-4"],
    "w3a16_g64": ["optim.lr=5e-4"],
    "w2a16_g64": ["optim.lr=2e-3"],
    "w4a16_channel": ["optim.lr=2e-4"],
    "w8a8": ["optim.lr=2e-5", "init=awq"],
    "w4a8": ["optim.lr=2e-4"],
    "nvfp4a16": ["optim.lr=2e-4"],
    "nvfp4": ["optim.lr=2e-4"],
}
TUNED: dict[str, list[str]] = {  # of `qat` alone, where it has 3800 steps, elsewhere 2000: 4.5 minutes at most
    "w4a16_g64": ["optim.betas=[0.9,0.99]"],
    "w3a16_g64": [],
    "w2a16_g64": ["optim.lr=1e-3", "optim.betas=[0.9,0.99]"],
}
REPEATED = ("w4a16_g64", "w3a16_g64", "w2a16_g64")  # with every seed; the others with the first
COMMON = ["format=none", "logger=none", "resume=never", "calibration.samples=128", "calibration.batch_size=8",
          "trainer.batch_size=32", "trainer.max_steps=400", "trainer.checkpoint_every=400", "trainer.val_every=400",
          "trainer.compile=true", "trainer.log_every=50", "optim.scale_lr=3e-3",
          "evaluation.windows=24", "evaluation.batch_size=8",
          "+method@arms.mse_rtn=mse_rtn", "+method@arms.blockap=blockwise"]  # fmt: skip
BLOCKAP = ["calibration.samples=1024", "arms.blockap.epochs=6", "arms.blockap.batch_size=8"]

Lane = Literal["trained", "ptq"]


class Cell(NamedTuple):
    """One entry of the table."""

    recipe: str
    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.recipe}.{self.arm}.{self.seed}"


def plan(recipes: list[str], arms: list[str], seeds: list[int]) -> list[Cell]:
    """What is asked for, in the order in which it is begun."""
    found: dict[Cell, None] = {}
    for seed in seeds:
        for recipe in recipes:
            for arm in sorted(arms, key=ARMS.index):
                if seed == seeds[0] or recipe in REPEATED:
                    named = "-" if arm in EVERYWHERE else recipe
                    found[Cell(named, arm, seed if arm in DRAWN else 0)] = None
    return [cell for cell in found if cell.arm in candidates(cell.recipe) or cell.arm not in PTQ]


def candidates(recipe: str) -> tuple[str, ...]:
    """The PTQ methods that a recipe is judged against: AutoRound where seeds are repeated."""
    return tuple(arm for arm in PTQ if arm != "autoround" or recipe in REPEATED)


def settings(cell: Cell, given: Namespace) -> list[str]:
    """How a cell is made, as overrides of `qat run`; its recipe, its seed and its paths apart."""
    mine = RECIPES.get(cell.recipe, RECIPES["w4a16_g64"]) if cell.arm in TRAINED else []
    own = {"blockap": BLOCKAP, "autoround": ["+method@arms.autoround=autoround"]}.get(cell.arm, [])
    if (cell.recipe, cell.arm) == ("w8a8", "qat_ce"):
        own = ["optim.lr=2e-4"]  # as `ft_fp`, which it is held to: at the other rate cross-entropy hardly trains
    if cell.arm in DISTILLED:
        steps, own = 2000, ["loss=kl"]
        if cell.arm == "qat" and cell.recipe in TUNED:
            steps, own = 3800, [*own, *TUNED[cell.recipe]]
        own += [f"trainer.{name}={steps}" for name in ("max_steps", "checkpoint_every", "val_every")]
    elif cell.arm in ("ft_fp", "qat_ce"):
        own = [*own, "loss=ce"]
    return [*COMMON, *mine, *own, *given.overrides]


def written(cell: Cell, given: Namespace) -> str:
    """Settings as the file has them: where the model lies is no part of them, what the recipe says is."""
    said = [] if cell.recipe == "-" else [rules(cell.recipe)]
    return " ".join([*(text for text in settings(cell, given) if not text.startswith("model.path=")), *said])


@cache
def rules(recipe: str) -> str:
    """What a recipe of this name says, as JSON: it may change, and its name stay."""
    config, problems = validate(VERBS["run"], [f"recipe={recipe}"], Tree.of([]), files=False)
    assert not problems, f"recipe={recipe}: {problems[0]}"
    return json.dumps(config["recipe"], separators=(",", ":"))


def digest(cell: Cell, given: Namespace) -> str:
    """What tells settings from others: of what `written` says, its SHA-256."""
    return hashlib.sha256(written(cell, given).encode()).hexdigest()[:12]


def composed(cell: Cell, given: Namespace) -> dict[str, Any]:
    """The config of a cell.

    Raises:
        ValueError: An override does not fit.
    """
    recipe = "w4a16_g64" if cell.recipe == "-" else cell.recipe
    own = [f"recipe={recipe}", f"seed={cell.seed}", f"calibration.seed={cell.seed}"]
    own += [f"data.path={given.tokens}", f"runs={given.work}/runs"]
    extra = [given.tokens] * (DOCS - 1) + [given.generated, *given.more]
    own += [f"data.extra=[{','.join(extra)}]"] if cell.arm in TRAINED else []
    config, problems = validate(VERBS["run"], [*settings(cell, given), *own], Tree.of([]))
    if problems:
        raise ValueError("\n".join(f"{problem}" for problem in problems))
    return config


@dataclass(frozen=True)
class Claim:
    """A cell that is this process's, as long as it lives."""

    cell: Cell
    handle: int

    def release(self) -> None:
        """Lets the cell go, done or not."""
        os.close(self.handle)


@dataclass(frozen=True)
class Board:
    """The cells of a plan, some of them done, some somebody's.

    Attributes:
        file: The results; a row for each cell that is done.
        work: Where claims are: files, locked by the processes whose they are.
        cells: The plan.
        digests: What the settings of a cell are now; a row of others does not count as done.
        beside: Whether a row of other settings stays when the cell is done; otherwise it is replaced.
    """

    file: Path
    work: Path
    cells: list[Cell]
    digests: dict[Cell, str] = field(default_factory=dict)
    beside: bool = False

    def claim(self, lane: Lane) -> Claim | None:
        """The next cell for a lane, or None: none may be begun now. A lane that trains takes the others at last."""
        with locked(self.work / "board.lock"):
            left = self.pending()
            trained = [cell for cell in left if cell.arm in TRAINED]
            fitting = trained if lane == "trained" and trained else [cell for cell in left if cell.arm not in TRAINED]
            for cell in fitting:
                needed = [other for other in self._needed(cell) if other in left]
                if not needed and (handle := self._lock(cell)) is not None:
                    return Claim(cell, handle)
        return None

    def finished(self, lane: Lane) -> bool:
        """Whether nothing will come for a lane any more."""
        return not [cell for cell in self.pending() if lane == "trained" or cell.arm not in TRAINED]

    def pending(self) -> list[Cell]:
        """What is neither done nor given up; somebody may be at it."""
        lost = set(self.failures())
        gone = self.done() | lost
        return [cell for cell in self.cells if cell not in gone and not lost.intersection(self._needed(cell))]

    def done(self) -> set[Cell]:
        """What the file has."""
        rows = [(_cell(row), row.get("settings")) for row in read(self.file)["rows"]]
        return {cell for cell, sha in rows if self.digests.get(cell, sha) == sha}

    def failures(self) -> dict[Cell, str]:
        """What went wrong, by cell."""
        files = {cell: self._file(cell, "failed") for cell in self.cells}
        return {cell: file.read_text(encoding="utf-8") for cell, file in files.items() if file.exists()}

    def fail(self, cell: Cell, reason: str) -> None:
        """Gives a cell up, and with it those that need it."""
        self._file(cell, "failed").write_text(reason, encoding="utf-8")

    def forgive(self) -> None:
        """Forgets what failed before: it is tried again."""
        for cell in self.cells:
            self._file(cell, "failed").unlink(missing_ok=True)

    def add(self, row: Row, meta: dict[str, Any]) -> None:
        """A cell is done; `meta` is added to what the file says of all of them, mapping by mapping."""
        with locked(self.work / "board.lock"):
            content = read(self.file)
            content["rows"] = [old for old in content["rows"] if not self._replaced(old, row)] + [row]
            for key, value in meta.items():
                old = content["meta"].get(key)
                content["meta"][key] = old | value if isinstance(old, dict) and isinstance(value, dict) else value
            used = {row.get("settings") for row in content["rows"]}
            if "settings" in content["meta"]:  # a row that was made anew takes its old ones along
                content["meta"]["settings"] = {sha: t for sha, t in content["meta"]["settings"].items() if sha in used}
            write(self.file, content)

    def _needed(self, cell: Cell) -> list[Cell]:
        arm = NEEDS.get(cell.arm)
        return [Cell("-" if arm in EVERYWHERE else cell.recipe, arm, cell.seed)] if arm else []

    def _replaced(self, old: Row, row: Row) -> bool:
        return _cell(old) == _cell(row) and not (self.beside and old.get("settings") != row.get("settings"))

    def _file(self, cell: Cell, kind: str) -> Path:
        """Of a cell as it is made now: other settings have another, since both may be under way."""
        return self.work / f"{cell}.{self.digests.get(cell, '-')}.{kind}"

    def _lock(self, cell: Cell) -> int | None:
        handle = os.open(self._file(cell, "lock"), os.O_RDWR | os.O_CREAT)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            return None
        return handle


def _cell(row: Row) -> Cell:
    return Cell(row["recipe"], row["arm"], row["seed"])
