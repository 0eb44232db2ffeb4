"""Overrides: what the command line says, sorted into choices of group options, values and removals.

`key=value` and `+key=value` mean the same here: whether a key exists is decided by the schema and by signatures, after
composition, so that every unknown key is reported and not only the first.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString, ValueType
from hydra.errors import HydraException

from qat.cli.problem import ConfigError, Problem, did_you_mean
from qat.cli.tree import GLOBAL_GROUPS, Slot, Tree, read_yaml
from qat.cli.verbs import Verb

RESERVED = ("verb", "choices")


@dataclass
class Overrides:
    """Lines for Hydra, and what is left for us.

    Attributes:
        lines: Overrides that Hydra takes.
        removals: Keys to remove after composition.
        problems: Overrides that cannot be used; the rest still composes.
        files: `group/option`, as the lines have it, to the file that was given by its path (`recipe=some/dir/x.yaml`).
    """

    lines: list[str] = field(default_factory=list)
    removals: list[str] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)


def quoted(text: str) -> str:
    """A text as one value of the override grammar, whatever it holds."""
    return QuotedString(text, Quote.single).with_quotes()


def sort_overrides(verb: Verb, texts: list[str], tree: Tree) -> Overrides:
    """Parses all overrides of a verb and checks the choices of group options among them."""
    assert verb.primary is not None, verb.name
    result = Overrides()
    parsed = [override for text in texts for override in _parse(text, result.problems)]
    slots = _slots(verb.primary, parsed, tree)
    chosen: Counter[str] = Counter()
    groups = set(tree.groups())
    for override in parsed:
        if override.package is None and override.key_or_group not in groups:
            _value(override, result)
            continue
        key = override.get_key_element().lstrip("+~")
        chosen[key] += 1
        if chosen[key] == 2:
            result.problems.append(Problem(key, "given twice"))
        problems = list(_group(verb, key, override, slots, groups, tree))
        result.problems += problems
        nothing = not override.is_delete() and override.value() is None  # as the defaults list has it
        if not problems and chosen[key] == 1 and not nothing:
            sign = "~" if override.is_delete() else "" if key in slots else "+"
            path = _file(override)
            result.lines.append(sign + (_bare(override) if path is None else _named(key, override, path, result, tree)))
    return result


def _file(override: Override) -> Path | None:
    """The file that stands in the place of an option's name."""
    value = override.value()
    if not isinstance(value, str) or override.key_or_group in GLOBAL_GROUPS:
        return None
    path = Path(value).expanduser()
    return path if path.suffix == ".yaml" and ("/" in value or path.is_file()) else None


def _named(key: str, override: Override, path: Path, result: Overrides, tree: Tree) -> str:
    """The override with a name for the file that no other option of its group has."""
    group, name = override.key_or_group, path.stem
    while tree.find(f"{group}/{name}") or f"{group}/{name}" in result.files:
        name = f"my_{name}"
    result.files[f"{group}/{name}"] = path
    return f"{key}={quoted(name)}"


def _parse(text: str, problems: list[Problem]) -> Iterator[Override]:
    try:
        override = OverridesParser.create().parse_override(text)
    except HydraException:
        what = "does not parse; " if "=" in text else "is no override; "
        problems.append(Problem(text, f"{what}write key=value, and quote text with spaces or signs: \"key='a, b'\""))
        return
    if override.value_type not in (None, ValueType.ELEMENT):
        text = f"{override.input_line}: a sweep over values, but a command takes one"
        key = override.key_or_group
        problems.append(Problem(key, f"{text}; write a list as {key}=[a,b] and text with a comma as \"{key}='a,b'\""))
        return
    yield override


def _slots(primary: str, overrides: list[Override], tree: Tree) -> dict[str, Slot]:
    """The defaults list that overrides meet: the primary's, and what the chosen experiment adds to it."""
    slots = {slot.key: slot for slot in tree.slots(primary)}
    for override in overrides:
        if override.package is None and override.key_or_group in GLOBAL_GROUPS and not override.is_delete():
            for option in _options(override.value()):
                if tree.find(name := f"{override.key_or_group}/{option}"):
                    slots |= {slot.key: slot for slot in tree.slots(name)}
    return slots


def _options(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _value(override: Override, result: Overrides) -> None:
    key = override.key_or_group
    if key.split(".")[0] in RESERVED:
        result.problems.append(Problem(key, "is set by the command itself"))
    elif key.split(".")[0].split("/")[0] == "hydra":
        result.problems.append(Problem(key, "Hydra's own settings are not used; --config-dir DIR adds configs"))
    elif "/" in key:
        result.problems.append(Problem(key, "no such group"))
    elif override.is_delete():
        result.removals.append(key)
    else:
        result.lines.append("++" + _bare(override))


def _bare(override: Override) -> str:
    assert override.input_line is not None
    return override.input_line.lstrip("+~")


def _group(
    verb: Verb, key: str, override: Override, slots: dict[str, Slot], groups: set[str], tree: Tree
) -> Iterator[Problem]:
    group = override.key_or_group
    if group not in groups:
        yield Problem(key, f"no such group{did_you_mean(group, groups)} (there are: {', '.join(sorted(groups))})")
        return
    if override.is_delete():
        if key not in slots:
            yield Problem(f"~{key}", f"not there{did_you_mean(key, slots)}")
        elif "." not in slots[key].place and slots[key].option is not None:
            yield Problem(f"~{key}", f"qat {verb.name} needs it; choose another option")
        return
    if key not in slots and override.package is None:
        places = [slot.key for slot in slots.values() if slot.group == group]
        hint = f"write {places[0].rpartition('.')[0]}.NAME={override.value()}" if places else "its groups are: "
        hint += "" if places else ", ".join(sorted(slots)) or "none"
        yield Problem(key, f"qat {verb.name} has no group of this name; {hint}")
        return
    value = override.value()
    if value is None and (key not in slots or slots[key].option is not None):
        yield Problem(key, f"needs an option (there are: {', '.join(tree.options(group))})")
    path = _file(override)
    for option in _options(value):
        if path is not None and not path.is_file():
            yield Problem(f"{key}={option}", "no such file")
            continue
        try:
            read_yaml(path) if path else tree.require(group, str(option))
        except ConfigError as error:
            yield from (Problem(f"{key}={option}", problem.text) for problem in error.problems)
