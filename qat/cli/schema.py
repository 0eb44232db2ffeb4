"""The schema: which keys exist and what their defaults are, read off the packaged config files themselves.

A group's node may have any key that one of the group's packaged options has. `_target_` nodes are not described here:
their keys are the parameters of what they name.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from qat.cli.devices import by_device, is_choice
from qat.cli.fields import FIELDS
from qat.cli.kinds import describe, is_open, kind, misfit
from qat.cli.problem import Problem, did_you_mean
from qat.cli.tree import GLOBAL_GROUPS, GLOBAL_HEADER, Tree
from qat.cli.verbs import Verb

OPEN = ("arms", "callbacks")  # mappings of the user's own names to targets
FREE = ("choices", "trainer.lightning")  # checked elsewhere


@dataclass
class Node:
    """One key: the defaults that it has in the packaged files, and the keys below it.

    Attributes:
        defaults: Scalars, lists and `_target_` mappings.
        children: Keys of the plain mappings among its defaults.
        seen: In how many of its parent's mappings it stands.
        mappings: How many of its defaults are plain mappings.
    """

    defaults: list[Any] = field(default_factory=list)
    children: dict[str, "Node"] = field(default_factory=dict)
    seen: int = 0
    mappings: int = 0

    def merge(self, content: Any) -> None:
        """Adds one more default."""
        self.seen += 1
        if not isinstance(content, dict) or "_target_" in content:
            self.defaults.append(content)
            return
        self.mappings += 1
        for key, value in content.items():
            self.children.setdefault(str(key), Node()).merge(value)

    def at(self, place: str) -> "Node":
        """The node of a dotted path, made if it is not there."""
        node = self
        for word in place.split("."):
            node = node.children.setdefault(word, Node())
        return node


def build_schema(verb: Verb, tree: Tree) -> Node:
    """The schema of a verb's config, without what its experiment adds."""
    assert verb.primary is not None, verb.name
    packaged = Tree(tree.roots[:1])
    root = Node()
    root.merge(_merged(packaged.bases(verb.primary)))
    for slot in packaged.slots(verb.primary):
        if slot.group in GLOBAL_GROUPS:
            continue
        node = root.at(packaged.target(slot))
        for option in packaged.options(slot.group):
            node.merge(_merged(packaged.bases(f"{slot.group}/{option}")))
    return root


def _merged(contents: list[dict[str, Any]]) -> dict[str, Any]:
    """Contents laid over one another, the last on top; a choice by device counts as its value for the CPU."""
    result: dict[str, Any] = {}
    for content in by_device(contents, "cpu"):
        for key, value in content.items():
            below = result.get(key)
            result[key] = _merged([below, value]) if isinstance(below, dict) and isinstance(value, dict) else value
    return result


def check_schema(config: dict[str, Any], schema: Node) -> Iterator[Problem]:
    """Unknown keys, missing keys and values of the wrong kind, in a config whose choices by device are made.

    The kinds of the keys that have a range are left to the check of the range, which knows whether null is one of them.
    """
    leaves = [path for path, _ in paths(config)]
    yield from _check(config, schema, "", sorted({*leaves, *(path for path, _ in _schema_paths(schema, ""))}))
    for path, value in paths(config):
        if value == "???":
            yield Problem(path, f"has no value; give it: {path}=...")


def _check(config: dict[str, Any], schema: Node, path: str, known: list[str]) -> Iterator[Problem]:
    for key, value in config.items():
        where = f"{path}.{key}".lstrip(".")
        if where in FREE:
            continue
        if key not in schema.children:
            yield Problem(where, _unknown(where, key, schema, known))
        elif where in OPEN:
            yield from _check_open(where, value)
        else:
            yield from _check_value(where, value, schema.children[key], known)
    for key, node in schema.children.items():
        where = f"{path}.{key}".lstrip(".")
        if key not in config and node.seen >= schema.mappings and where not in OPEN:
            yield Problem(where, f"is missing; give it: {where}=...")


def _check_value(where: str, value: Any, node: Node, known: list[str]) -> Iterator[Problem]:
    if is_choice(value) or is_open(value):
        return  # incomplete, and reported as such
    if value == {} and node.mappings:
        return  # an option such as `none` that builds nothing
    if any(isinstance(default, dict) for default in node.defaults):
        others = {kind(default) for default in node.defaults} - {"dict"}
        if not (isinstance(value, dict) and "_target_" in value) and kind(value) not in others:
            hint = f"; a group's option is chosen as GROUP@{where}={value}" if isinstance(value, str) else ""
            yield Problem(where, f"expected a mapping with _target_, found {describe(value)}{hint}")
    elif isinstance(value, dict) and "_target_" in value:
        yield Problem(where, "takes no _target_")
    elif isinstance(value, dict) and node.mappings:
        yield from _check(value, node, where, known)
    elif node.mappings and kind(value) not in {kind(default) for default in node.defaults}:
        yield Problem(where, f"expected a mapping with {', '.join(node.children)}; found {describe(value)}")
    elif where not in FIELDS and (text := misfit(node.defaults, value)):
        yield Problem(where, text)


def _check_open(where: str, value: Any) -> Iterator[Problem]:
    if not isinstance(value, dict):
        yield Problem(where, f"expected a mapping of names to targets, found {describe(value)}")
        return
    for name, node in value.items():
        if not isinstance(node, dict) or "_target_" not in node:
            yield Problem(f"{where}.{name}", f"expected a mapping with _target_, found {describe(node)}")


def _unknown(where: str, key: str, schema: Node, known: list[str]) -> str:
    if where in GLOBAL_GROUPS:
        return f"no such key; a file in the group {where} starts with the line `{GLOBAL_HEADER}`"
    place = where.removesuffix(key)
    near = did_you_mean(key, schema.children)
    if not near:
        elsewhere = [path for path in known if path != where and path.rpartition(".")[2] == key]
        near = f"; did you mean {elsewhere[0]}?" if elsewhere else ""
    there = f" ({place.rstrip('.')} has: {', '.join(schema.children)})" if place else ""
    return f"no such key{near or there}"


def paths(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted path and value of every leaf."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from paths(value, f"{path}.{key}".lstrip("."))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from paths(value, f"{path}[{index}]")
    else:
        yield path, node


def _schema_paths(node: Node, path: str) -> Iterator[tuple[str, Node]]:
    for key, child in node.children.items():
        where = f"{path}.{key}".lstrip(".")
        yield where, child
        yield from _schema_paths(child, where)
