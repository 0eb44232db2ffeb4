"""Values built for real: the targets that need no torch refuse their own nonsense, in their own words."""

import importlib
from collections.abc import Mapping
from typing import Any

from qat.cli import source
from qat.cli.kinds import is_open
from qat.cli.problem import Problem


class Opaque:
    """Stands for what is not built before the verb runs, or could not be."""


def build(config: Mapping[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """A config with every torch-free target of this project replaced by what it builds.

    Args:
        config: Choices by device made.
        problems: What is known to be wrong: such nodes are not tried. Refusals are appended.
    """
    return {key: _build(value, key, problems) for key, value in config.items()}


def _build(node: Any, path: str, problems: list[Problem]) -> Any:
    if is_open(node):
        return Opaque()
    if isinstance(node, list):
        items = [_build(value, f"{path}[{index}]", problems) for index, value in enumerate(node)]
        return items if not any(isinstance(item, Opaque) for item in items) else Opaque()
    if not isinstance(node, dict):
        return node
    built = {key: _build(value, f"{path}.{key}", problems) for key, value in node.items()}
    unbuilt = any(isinstance(value, Opaque) for value in built.values())
    if "_target_" not in node:
        return Opaque() if unbuilt else built
    if any(problem.where == path or problem.where.startswith((f"{path}.", f"{path}[")) for problem in problems):
        return Opaque()
    target = str(node["_target_"])
    if unbuilt or node.get("_partial_") or not _is_ours(target):
        return Opaque()
    try:
        return _call(target, {key: value for key, value in built.items() if not key.startswith("_")})
    except (ValueError, TypeError) as error:
        problems.append(Problem(path, str(error)))
        return Opaque()


def _is_ours(target: str) -> bool:
    return target.startswith("qat.") and source.is_light(source.find(target).module)


def _call(target: str, arguments: dict[str, Any]) -> Any:
    module, names = source.split_target(target)
    result: Any = importlib.import_module(module)
    for name in names:
        result = getattr(result, name)
    return result(**arguments)
