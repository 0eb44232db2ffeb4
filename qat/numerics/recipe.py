"""Recipe: ordered rules from module names to schemes. Torch-free; training, PTQ, export and serving all read it."""

import re
from dataclasses import dataclass, field

from qat.numerics.scheme import Scheme


@dataclass(frozen=True)
class Rule:
    """What happens to the modules whose full name matches a pattern.

    Attributes:
        match: A regular expression, matched against the whole module name (`re.fullmatch`).
        weight: Scheme of the weight; None leaves the module alone.
        input: Scheme of the module's input, or None.

    Raises:
        ValueError: `match` is no regular expression, or an input scheme stands without a weight scheme, or has
            signed scales.
    """

    match: str
    weight: Scheme | None
    input: Scheme | None = None

    def __post_init__(self) -> None:
        try:
            re.compile(self.match)
        except (re.error, TypeError) as error:
            raise ValueError(f"match={self.match!r} is not a regular expression: {error}") from None
        if self.weight is None and self.input is not None:
            raise ValueError(f"match={self.match!r}: an input scheme needs a weight scheme beside it")
        if self.input is not None and self.input.convention == "signed":
            raise ValueError(f"match={self.match!r}: convention='signed' is for weights; an input's scale is positive")

    def matches(self, name: str) -> bool:
        """Whether the rule speaks of the module of this name."""
        return re.fullmatch(self.match, name) is not None


@dataclass(frozen=True)
class Recipe:
    """Named rules in order; the LAST one that matches a module wins, as in .gitignore.

    Attributes:
        rules: Name of the rule to rule. An experiment that adds a rule adds it at the end, so it is an exception.
        kv: Scheme of the KV cache, or None.
    """

    rules: dict[str, Rule] = field(default_factory=dict)
    kv: Scheme | None = None

    def rule_for(self, name: str) -> tuple[str, Rule] | None:
        """The name of the rule that decides for a module, and the rule; None if none matches."""
        hits = [(key, rule) for key, rule in self.rules.items() if rule.matches(name)]
        return hits[-1] if hits else None
