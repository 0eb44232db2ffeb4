"""Who can serve an export: `export.target` held to the facts of `qat/formats/targets.py`, and the kernels of a plan."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from qat.cli.fields import at
from qat.cli.model_file import ModelFacts
from qat.cli.problem import Problem
from qat.cli.rules import methods
from qat.formats.targets import ENGINES, READS, Layer, verdicts, whole
from qat.numerics.recipe import Recipe
from qat.numerics.scheme import Scheme


def reorders(config: Mapping[str, Any]) -> bool:
    """Whether what is exported has groups that are not of consecutive in-features: where training ends none has."""
    exported = (node for where, node in methods(config) if where.startswith(("method", "adapter")))
    return any(at(node, "act_order") == "dynamic" for node in exported)


def layers_of(recipe: Recipe, shapes: Mapping[str, tuple[int, int]], g_idx: bool = False) -> list[Layer]:
    """The linears of a model under a recipe."""
    rules = {name: recipe.rule_for(name) for name in shapes}
    return [
        Layer(name, shapes[name], hit and hit[1].weight, hit and hit[1].input, g_idx) for name, hit in rules.items()
    ]


def target(config: dict[str, Any], recipe: Any, facts: ModelFacts | None) -> Iterator[Problem]:
    """What the export's target refuses, the first layer of each rule; without the model's files, each rule by itself.

    Without a recipe, as in `qat export`, the format and the storage dtype are all that is known yet.
    """
    wanted, name, dtype = (at(config, key) for key in ("export.target", "format.name", "export.dtype"))
    if wanted not in READS or not isinstance(name, str):
        return
    if not isinstance(recipe, Recipe):
        yield from (Problem(key, text) for key, text in whole(wanted, name, str(dtype), None))
        return
    if facts is not None and facts.linears:
        layers = layers_of(recipe, facts.linears, reorders(config))
        keys = {m: recipe.rule_for(m) for m in facts.linears}
        rules = {module: hit[0] for module, hit in keys.items() if hit is not None}
    else:
        layers = [
            Layer(f"{rule.match} (rule {key})", None, rule.weight, rule.input, reorders(config))
            for key, rule in recipe.rules.items()
        ]
        rules = dict(zip((layer.name for layer in layers), recipe.rules, strict=True))
    said = set()
    for module, part, text in refusals(wanted, name, layers, str(dtype), recipe.kv):
        where = f"recipe.rules.{rules[module]}.{part}" if module else part
        if where not in said:
            said.add(where)
            yield Problem(where, text)


def check(config: Mapping[str, Any], layers: list[Layer], kv: Scheme | None) -> None:
    """The same of a model that is loaded.

    Raises:
        ValueError: The export's target refuses a layer, or the file as a whole; names the first.
    """
    export = config["export"]
    if (wanted := export.get("target")) is None:
        return
    for module, part, text in refusals(wanted, config["format"]["name"], layers, export["dtype"], kv):
        raise ValueError(text if module else f"{part}: {text}")


def refusals(
    wanted: str, name: str, layers: list[Layer], dtype: str, kv: Scheme | None
) -> Iterator[tuple[str, str, str]]:
    """Module (empty for the file as a whole), key, and what is wrong, with the fix."""
    parts = list(whole(wanted, name, dtype, kv))
    yield from (("", part, text) for part, text in parts)
    if any(part == "format.name" for part, _ in parts):
        return
    for verdict in verdicts(wanted, name, layers, dtype):
        if verdict.refused:
            yield verdict.layer.name, verdict.part, verdict.refused


def kernel_lines(wanted: str, name: str, layers: list[Layer], dtype: str) -> list[str]:
    """Which kernel of the target takes which layers, a line for each run of like ones."""
    groups: dict[tuple[str, str, str], int] = {}
    for verdict in verdicts(wanted, name, layers, dtype):
        layer = verdict.layer
        key = (layer.name.rpartition(".")[2], str(list(layer.shape or ())), verdict.kernel or "none: refused")
        groups[key] = groups.get(key, 0) + 1
    head = f"export.target={wanted}: kernels by its source and documentation, not run here"
    return [head, *(f"  {kind:10} {shape:14} x {count:<4} {kernel}" for (kind, shape, kernel), count in groups.items())]


def served(name: str, layers: list[Layer], dtype: str, kv: Scheme | None) -> dict[str, str | None]:
    """Engine to why it does not serve an export in a format; None where nothing is known against it."""
    found: dict[str, str | None] = {}
    for engine in ENGINES:
        first: Iterable[tuple[str, str, str]] = refusals(engine, name, layers, dtype, kv)
        found[engine] = next((text if module else f"{part}: {text}" for module, part, text in first), None)
    return found
