"""Ranges: what a single key may hold beyond its kind. The kinds of keys whose default is null are fixed here, too.

Keys of `_target_` nodes are here only where what they name cannot say it before torch is imported.
"""

import math
import re
from collections.abc import Callable, Iterator
from typing import Any

from qat.cli import source
from qat.cli.kinds import describe, is_open
from qat.cli.problem import Problem, did_you_mean
from qat.formats.targets import READS

Check = Callable[[Any], str | None]
PRECISIONS = ("auto", "32-true", "bf16-mixed")  # those whose masters are fp32


def at(config: Any, path: str) -> Any:
    """The value at a dotted path; None if it is not there."""
    for word in path.split("."):
        config = config.get(word) if isinstance(config, dict) else None
    return config


def is_number(value: Any) -> bool:
    """Whether a value is an integer or a float, and not a truth value."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def whole(least: int = 1, most: int | None = None, null: bool = False) -> Check:
    """An integer within bounds."""

    def check(value: Any) -> str | None:
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
        if (value is None and null) or (fits and (most is None or value <= most)):
            return None
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        return f"expected an integer {bounds}{' or null' if null else ''}, found {describe(value)}"

    return check


def number(words: str, fits: Callable[[float], bool], null: bool = False) -> Check:
    """A number that fits, said in words."""

    def check(value: Any) -> str | None:
        if (value is None and null) or (is_number(value) and fits(value)):
            return None
        return f"expected {words}{' or null' if null else ''}, found {describe(value)}"

    return check


def one_of(*options: str, null: bool = False) -> Check:
    """One of a few words."""

    def check(value: Any) -> str | None:
        if value in options or (value is None and null):
            return None
        words = ", ".join(options) + (" or null" if null else "")
        return f"expected one of {words}, found {describe(value)}{did_you_mean(str(value), options)}"

    return check


def text(null: bool = False) -> Check:
    """A text that is not empty."""

    def check(value: Any) -> str | None:
        if (value is None and null) or (isinstance(value, str) and value):
            return None
        return f"expected text{' or null' if null else ''}, found {describe(value)}"

    return check


def texts(least: int) -> Check:
    """A list of so many texts or more."""

    def check(value: Any) -> str | None:
        if isinstance(value, list) and len(value) >= least and all(isinstance(item, str) and item for item in value):
            return None
        return f"expected a list of texts, at least {least} and none empty; found {describe(value)}"

    return check


def device(value: Any) -> str | None:
    """A device's name."""
    if isinstance(value, str) and re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        return None
    return f"expected auto, cpu, cuda or cuda:N, found {describe(value)}"


def export_format(value: Any) -> str | None:
    """A module of `qat/formats` that is a format, or `none`."""
    home = source.module_file("qat.formats")
    assert home is not None
    formats = [path.stem for path in home.parent.glob("*.py") if "\nMETHOD" in path.read_text(encoding="utf-8")]
    return one_of(*sorted(formats), "none")(value)


def widths(value: Any) -> str | None:
    """A list of two numbers of bits or more, none twice."""
    if isinstance(value, list) and len(value) >= 2 and all(whole(2, 8)(b) is None for b in value):
        return None if len(set(value)) == len(value) else f"expected each width once, found {describe(value)}"
    return f"expected a list of integers from 2 to 8, at least two; found {describe(value)}"


def shares(value: Any) -> str | None:
    """A list of numbers from 0 to 1, at least one."""
    if isinstance(value, list) and value and all(is_number(item) and 0 <= item <= 1 for item in value):
        return None
    return f"expected a list of numbers from 0 to 1, at least one; found {describe(value)}"


POSITIVE = number("a finite number above 0", lambda x: 0 < x < math.inf)
UNSIGNED = number("a finite number of at least 0", lambda x: 0 <= x < math.inf)
FRACTION = number("a number from 0 to 1", lambda x: 0 <= x <= 1)
SHARE = number("a number above 0, at most 1", lambda x: 0 < x <= 1)
RATE = number("a finite number above 0", lambda x: 0 < x < math.inf, null=True)

OBSERVERS: dict[str, Check] = {
    "points": whole(),
    "smallest": SHARE,
    "norm": POSITIVE,
    "decay": number("a number of at least 0, below 1", lambda x: 0 <= x < 1),
    "percent": number("a number above 50, at most 100", lambda x: 50 < x <= 100),
}

FIELDS: dict[str, Check] = {
    **{f"{place}.{key}": check for place in ("observer", "input_observer") for key, check in OBSERVERS.items()},
    "seed": whole(0, 2**32 - 1),
    "runs": text(),
    "run": text(),
    "resume": text(),
    "path": text(null=True),
    "from": text(null=True),
    "out": text(null=True),
    "arm": text(null=True),
    "split": one_of("test", "validation"),
    "budget": POSITIVE,
    "bits": widths,
    "unit": one_of("linear", "stage", "block", "kind"),
    "metric": one_of("kl", "nll"),
    "measured": text(null=True),
    "device": device,
    "threads": whole(null=True),
    "prompts": texts(least=3),
    "calibration.samples": whole(),
    "calibration.seq_len": whole(2),
    "calibration.batch_size": whole(),
    "calibration.seed": whole(0),
    "evaluation.windows": whole(null=True),
    "evaluation.seq_len": whole(2),  # a window of one token predicts nothing
    "evaluation.batch_size": whole(),
    "export.dtype": one_of("bfloat16", "float16", "float32"),
    "export.target": one_of(*READS, null=True),
    "certificate.new_tokens": whole(32),  # fewer prove nothing (`evaluation/verify.py`), as do fewer prompts than 3
    "generate.max_tokens": whole(),
    "tokens": whole(),
    "length": whole(2),
    "sequences": whole(),
    "prompt.path": text(null=True),
    "prompt.tokens": whole(),
    "min_distinct": FRACTION,
    "splits.validation": FRACTION,
    "splits.test": FRACTION,
    "model.name": text(),
    "model.path": text(null=True),
    "model.revision": text(null=True),
    "data.path": text(null=True),
    "data.extra": texts(least=0),
    "data.seq_len": whole(2),
    "format.name": export_format,
    "logger.wandb.project": text(),
    "logger.wandb.entity": text(null=True),
    "logger.wandb.mode": one_of("auto", "online", "offline", "disabled"),
    "optim.lr": POSITIVE,
    "optim.scale_lr": POSITIVE,
    "optim.weight_decay": UNSIGNED,
    "optim.warmup": FRACTION,
    "optim.final": FRACTION,
    "adapter.rank": whole(),
    "adapter.alpha": POSITIVE,
    "adapter.dropout": number("a number of at least 0, below 1", lambda x: 0 <= x < 1),
    "adapter.group_size": whole(),
    "adapter.seed": whole(0),
    "schedule.winq.every": whole(),
    "schedule.winq.alpha": SHARE,
    "trainer.max_steps": whole(),
    "trainer.accumulate": whole(),
    "trainer.clip": RATE,
    "trainer.precision": one_of(*PRECISIONS),
    "trainer.batch_size": whole(),
    "trainer.checkpoint_every": whole(),
    "trainer.val_every": whole(),
    "trainer.log_every": whole(),
    "trainer.val_windows": whole(),
    "server.host": text(),
    "server.port": whole(0, 65535),
    "server.name": text(null=True),
    "server.max_queue": whole(0),
    "server.drain_seconds": number("seconds from 0 to 86400", lambda x: 0 <= x <= 86400),
    "sampling.max_tokens": whole(),
    "sampling.greedy_tokens": whole(0),
    "sampling.temperature": UNSIGNED,
    "sampling.top_p": SHARE,
    "sampling.seed": whole(0, null=True),
}


KNOBS: dict[str, Check] = {  # of a method of this project, wherever a config names one
    "damping": UNSIGNED,
    "asymmetry": UNSIGNED,
    "block_size": whole(),
    "grid": whole(0),
    "alphas": shares,
    "epochs": whole(),
    "batch_size": whole(),
    "lr": RATE,
    "scale_lr": RATE,
    "seed": whole(0),
    **{f"{place}.{key}": check for place in ("observer", "input_observer") for key, check in OBSERVERS.items()},
}


def check_fields(config: dict[str, Any]) -> Iterator[Problem]:
    """Each key that is there, held to its range; choices by device are made."""
    for path, text in out_of_range(config, FIELDS):
        if path.startswith("evaluation.") and config.get("verb") == "eval" and at(config, path) is None:
            continue  # as the run had it
        yield Problem(path, text)


def out_of_range(node: dict[str, Any], fields: dict[str, Check]) -> Iterator[tuple[str, str]]:
    """Path and complaint of each key that is there and does not hold what it may."""
    for path, check in fields.items():
        place, _, leaf = path.rpartition(".")
        inner = at(node, place) if place else node
        if isinstance(inner, dict) and leaf in inner and not is_open(inner[leaf]) and (text := check(inner[leaf])):
            yield path, text
