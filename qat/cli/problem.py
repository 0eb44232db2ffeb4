"""A problem: what is wrong with a configuration, where, and how to put it right."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One sentence about one place.

    Attributes:
        where: A key path, an override or a file.
        text: What is wrong with it, and the fix.
    """

    where: str
    text: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}"


class ConfigError(ValueError):
    """A configuration that cannot be used; the command line reports all of its problems and exits with status 2."""

    def __init__(self, problems: Iterable[Problem]):
        self.problems = list(problems)
        super().__init__("; ".join(map(str, self.problems)))


def did_you_mean(word: str, options: Iterable[str]) -> str:
    """`"; did you mean x?"` for the nearest option, or nothing."""
    hits = difflib.get_close_matches(word, list(options), n=1, cutoff=0.6)
    return f"; did you mean {hits[0]}?" if hits else ""


def extend(found: list[Problem], stage: Iterable[Problem]) -> None:
    """Appends a stage's problems, except repetitions and those of places that an earlier stage has spoken of."""
    settled = {problem.where for problem in found}
    for problem in stage:
        if problem.where not in settled and problem not in found:
            found.append(problem)


def report(command: str, problems: list[Problem]) -> str:
    """All problems as the command line prints them."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return "\n".join([f"{command}: {count}", *(f"  {problem}" for problem in problems)])
