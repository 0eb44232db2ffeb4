"""Validation: everything that can be known before torch is imported, all of it at once.

Overrides, composition, keys and kinds, targets, ranges, values, rules across keys, files: a later stage says nothing of
a place that an earlier one has spoken of. Choices by device are checked for every device.
"""

from typing import Any

from qat.cli.compose import compose, plain, remove
from qat.cli.devices import DEVICE_TYPES, by_device, check_choices
from qat.cli.fields import check_fields
from qat.cli.files import check_files
from qat.cli.overrides import sort_overrides
from qat.cli.problem import ConfigError, Problem, extend
from qat.cli.rules import check_rules
from qat.cli.schema import Node, build_schema, check_schema
from qat.cli.targets import check_targets
from qat.cli.tree import Tree
from qat.cli.values import build
from qat.cli.verbs import Verb


def validate(verb: Verb, texts: list[str], tree: Tree, files: bool = True) -> tuple[dict[str, Any], list[Problem]]:
    """The config of a verb as nested dicts, and all that is wrong with it.

    Args:
        verb: A verb with a primary config.
        texts: Overrides, as written.
        tree: Where configs are.
        files: Whether to check what the config names on this machine, too.

    Returns:
        The config, choices by device unmade; empty if it does not compose. It can be used if there is no problem.
    """
    assert verb.primary is not None, verb.name
    problems: list[Problem] = []
    try:
        overrides = sort_overrides(verb, texts, tree)
        extend(problems, overrides.problems)
        composed = compose(verb.primary, overrides, tree)
        schema = build_schema(verb, tree)
    except ConfigError as error:
        extend(problems, error.problems)
        return {}, problems
    extend(problems, remove(composed, overrides.removals))
    composed.verb = verb.name
    config, unresolved = plain(composed)
    extend(problems, unresolved)
    extend(problems, check_choices(config))
    found = [_check(by_device(config, device_type), schema, list(problems), files) for device_type in DEVICE_TYPES]
    return config, list(dict.fromkeys(problem for one in found for problem in one))


def _check(config: dict[str, Any], schema: Node, problems: list[Problem], files: bool) -> list[Problem]:
    extend(problems, check_schema(config, schema))
    extend(problems, check_targets(config))
    extend(problems, check_fields(config))
    built = build(config, problems)
    extend(problems, check_rules(config, built))
    if files:
        extend(problems, check_files(config, built))
    return problems
