"""A recipe of mixed widths as a config: the recipe that it came from, and behind its rules those of other widths."""

import copy
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import yaml

Config = dict[str, Any]


def mixed_recipe(recipe: Config, blocks: str, widths: Mapping[str, int], rules: Mapping[str, str | None]) -> Config:
    """A recipe's config in which every quantized module has a width of its own.

    Each rule with a weight scheme keeps its pattern and takes the width that most of its modules have; the others get
    rules of their own, behind all that were there, since the last match wins. One rule names all modules of a width
    whose kinds are in the same blocks.

    Args:
        recipe: The recipe's node of a composed config.
        blocks: Path of the list of decoder blocks.
        widths: Module name to bits.
        rules: Name of every module that a rule could match to the key of the one that decides for it.

    Returns:
        The node of another recipe, in the same words: all but the widths is as it was.
    """
    result = copy.deepcopy(recipe)
    for key in dict.fromkeys(rules[name] for name in widths):
        assert key is not None, "a module is quantized because a rule says so"
        mine = {name: bits for name, bits in widths.items() if rules[name] == key}
        usual = Counter(mine.values()).most_common(1)[0][0]
        result["rules"][key] = _rule(recipe["rules"][key], recipe["rules"][key]["match"], usual)
        for bits in sorted(set(mine.values()) - {usual}):
            for match in _patterns(blocks, [name for name in mine if mine[name] == bits], list(rules)):
                name = _free(f"{key}_w{bits}", result["rules"])
                result["rules"][name] = _rule(recipe["rules"][key], match, bits)
    return result


def dump(recipe: Config, comment: str) -> str:
    """A recipe's config as a file of the group `recipe`, a comment first."""
    return f"# {comment}\n" + yaml.safe_dump(recipe, sort_keys=False, width=1000, default_flow_style=None)


def _rule(rule: Config, match: str, bits: int) -> Config:
    found = copy.deepcopy(rule)
    found["match"] = match
    found["weight"]["grid"]["bits"] = bits
    return found


def _patterns(blocks: str, modules: list[str], of: list[str]) -> list[str]:
    """Regular expressions that match some modules and no other one of `of`."""
    places: dict[str, list[str]] = {}  # kind to the blocks that it is in
    result = []
    for name in modules:
        if place := re.fullmatch(rf"{re.escape(blocks)}\.(\d+)\.(.+)", name):
            places.setdefault(place[2], []).append(place[1])
        else:
            result.append(re.escape(name))
    kinds: dict[tuple[str, ...], list[str]] = {}
    for kind, indices in places.items():
        kinds.setdefault(tuple(indices), []).append(kind)
    for where, members in kinds.items():
        some = _any(list(where))
        rest = _any([re.escape(kind) for kind in members])
        all_blocks = rf"{re.escape(blocks)}\.\d+\.{rest}"
        reached = sum(re.fullmatch(all_blocks, name) is not None for name in of)
        everywhere = len(where) > 1 and reached == len(where) * len(members)
        result.append(all_blocks if everywhere else rf"{re.escape(blocks)}\.{some}\.{rest}")
    return result


def _any(texts: list[str]) -> str:
    return texts[0] if len(texts) == 1 else f"({'|'.join(texts)})"


def _free(name: str, taken: Mapping[str, Any]) -> str:
    """The name, or it with the first number that nobody has."""
    names = [name, *(f"{name}_{i}" for i in range(2, len(taken) + 3))]
    return next(n for n in names if n not in taken)
