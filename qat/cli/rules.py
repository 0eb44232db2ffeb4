"""Rules that join several keys: functions of a composed config, choices by device made, and of the recipe it builds."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from qat.cli.fields import KNOBS, at, is_number, out_of_range
from qat.cli.format_rules import carries
from qat.cli.problem import Problem
from qat.formats.ct_args import PACKED, refused, sub_format
from qat.numerics.allocate import at_width
from qat.numerics.granularity import PerGroup, PerToken
from qat.numerics.grid import Codebook
from qat.numerics.kv import kind_of
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import E8M0, integers

LEARNING = ("LSQ", "LSQPlus", "EfficientQAT", "PACT", "SEQ")  # estimators that learn a scale
RESERVED_ARMS = ("fp", "qat")
METHODS = ("qat.ptq.", "qat.training.blockwise.")  # where what finds codes lives


def check_rules(config: dict[str, Any], built: dict[str, Any]) -> Iterator[Problem]:
    """All rules. Keys that are missing or of the wrong kind are left to the checks before this one."""
    yield from schedule(config)
    yield from betas(config)
    yield from arms(config)
    yield from settled(config)
    yield from adapter(config)
    yield from data(config)
    yield from generate(config)
    yield from export(config)
    recipe = built.get("recipe")
    yield from reordered(config, recipe)
    if isinstance(recipe, Recipe):
        yield from recipe_quantizes(recipe)
        yield from weights(recipe)
        yield from kv(recipe)
        if "bits" in config:
            yield from widths(recipe)
        yield from estimators(config, recipe)
        if at(config, "format.name") == "compressed_tensors":
            yield from compressed_tensors(recipe)
        yield from carries(str(at(config, "format.name")), recipe)


def schedule(config: dict[str, Any]) -> Iterator[Problem]:
    """Every weight is on its grid before training ends; scales settle after that began, and are learned if asked to."""
    names = ("start", "freeze", "ramp")
    found = {name: value for name in names if is_number(value := at(config, f"schedule.{name}"))}
    steps = at(config, "trainer.max_steps")
    for name, value in found.items():
        if value < 0:
            yield Problem(f"schedule.{name}", f"a step of {value}; steps count from 0")
    start, freeze, ramp = (found.get(name, 0) for name in names)
    if freeze < start and "freeze" in found:
        yield Problem("schedule.freeze", f"{freeze} comes before schedule.start={start}; freeze at {start} or later")
    if not is_number(steps) or min(found.values(), default=0) < 0:
        return
    if start >= steps:
        yield Problem("schedule.start", f"{start} is not below trainer.max_steps={steps}: nothing would be quantized")
    elif start + ramp >= steps:
        text = f"{ramp} steps from schedule.start={start} on are not below trainer.max_steps={steps}"
        yield Problem("schedule.ramp", f"{text}: weights would never be on their grid; at most {steps - start - 1}")
    else:
        yield from _after(config, max(freeze, start + 1 if start else 0), steps)


def _after(config: dict[str, Any], settled: int, steps: int) -> Iterator[Problem]:
    """What waits for the step from which on scales no longer follow the weights."""
    estimator = str(at(config, "estimator._target_")).rpartition(".")[2]
    if estimator in LEARNING and settled >= steps:
        text = f"scales follow the weights until step {settled}, which is not below trainer.max_steps={steps}"
        text = f"{text}: the estimator {estimator} would never learn a scale; end it earlier, or take estimator=clipped"
        yield Problem("schedule.freeze", text)
    every = at(config, "schedule.winq.every")
    if is_number(every) and every > 0 and -(-max(settled, 1) // every) * every >= steps:
        text = f"no multiple of {every} lies between step {settled}, when scales are settled, and trainer.max_steps"
        yield Problem("schedule.winq.every", f"{text}={steps}: nothing would be re-initialised; lower it")


def betas(config: dict[str, Any]) -> Iterator[Problem]:
    """Adam's decay rates."""
    values = at(config, "optim.betas")
    for index, value in enumerate(values if isinstance(values, list) else []):
        if is_number(value) and not 0 <= value < 1:
            yield Problem(f"optim.betas[{index}]", f"expected a number from 0 to below 1, found {value}")


def methods(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every method that a config names, and where: arms, what is exported, where training starts; and what goes on."""
    arms = at(config, "arms")
    places = [f"arms.{name}" for name in arms] if isinstance(arms, dict) else []
    for where in (*places, "method", "init.method", "adapter.then"):
        node = at(config, where)
        while node is not None:
            yield where, node
            where, node = f"{where}.then", at(node, "then")


def arms(config: dict[str, Any]) -> Iterator[Problem]:
    """Arms of a comparison, where training starts, what follows it: names of files, methods of this project."""
    nodes = at(config, "arms")
    for name in nodes if isinstance(nodes, dict) else []:
        if name in RESERVED_ARMS:
            yield Problem(f"arms.{name}", "every comparison has an arm of this name already; choose another")
        elif not re.fullmatch(r"\w+", name):
            yield Problem(f"arms.{name}", "an arm's name is made of letters, digits and underscores")
    for where, node in methods(config):
        target = at(node, "_target_")
        if not isinstance(target, str) or not target.startswith("qat."):
            continue
        if not target.startswith(METHODS):
            yield Problem(f"{where}._target_", f"{target} is no PTQ method; those live in qat.ptq")
            continue
        for path, text in out_of_range(node, KNOBS):
            yield Problem(f"{where}.{path}", text)
        order, groups = at(node, "act_order"), at(node, "groups")
        if order == "static" and groups in ("current", "stale"):
            text = f"{groups} ranges go with act_order=group, dynamic or none, which take whole groups; it is {order}"
            yield Problem(f"{where}.groups", text)


def reordered(config: Mapping[str, Any], recipe: Any) -> Iterator[Problem]:
    """Groups that are not of consecutive in-features need a `g_idx`, which few formats carry, and training does not."""
    name = at(config, "format.name")
    refused = f"format={name} cannot carry" if name in ("awq", "gguf") else None
    if name == "compressed_tensors" and isinstance(recipe, Recipe) and (other := _unpacked(recipe)):
        refused = f"format={name} has in {PACKED} alone, and {other} is not"
    for where, node in methods(config):
        if at(node, "act_order") != "dynamic":
            continue
        if where.startswith("init."):
            text = "training's groups are of consecutive in-features, and dynamic ones are not; use group or static"
            yield Problem(f"{where}.act_order", text)
        elif refused:
            text = f"dynamic needs a g_idx, which {refused}; use group or static, or format=gptq"
            yield Problem(f"{where}.act_order", text)


def _unpacked(recipe: Recipe) -> str | None:
    """The first rule of which compressed-tensors has groups in another sub-format than packed integers."""
    for where, rule in _weight_rules(recipe):
        assert rule.weight is not None
        if isinstance(rule.weight.granularity, PerGroup) and sub_format(integers(rule.weight), rule.input) != PACKED:
            return where
    return None


def settled(config: dict[str, Any]) -> Iterator[Problem]:
    """Scales that follow the weights forget where training started, and cannot be what codes were settled with."""
    freeze, method = at(config, "schedule.freeze"), at(config, "init.method")
    if is_number(freeze) and freeze > 0:
        text = f"until step {freeze} scales follow the weights"
        if isinstance(method, dict):
            option = at(config, "choices.init")
            yield Problem("schedule.freeze", f"{text}, and those that init={option} found are forgotten; use 0")
        if at(config, "optim.train") == "scales":
            yield Problem("schedule.freeze", f"{text}, but optim.train=scales has its codes settled; use 0")
    if isinstance(at(config, "schedule.winq"), dict) and at(config, "optim.train") == "scales":
        yield Problem("schedule.winq", "optim.train=scales trains no masters to be re-initialised; use winq=null")


def adapter(config: dict[str, Any]) -> Iterator[Problem]:
    """An adapter trains A and B; QLoRA knows neither codes to start from nor fake-quantization."""
    kind = str(at(config, "adapter._target_")).rpartition(".")[2]
    if kind not in ("LoRA", "QLoRA"):
        return
    if at(config, "optim.train") == "scales":
        yield Problem("optim.train", "scales alone would train, and no adapter; use optim.train=all or adapter=none")
    if isinstance(at(config, "schedule.winq"), dict):
        yield Problem("schedule.winq", "it would move masters, but an adapter leaves them frozen; use null")
    if kind == "LoRA":
        return
    if isinstance(at(config, "init.method"), dict):
        text = f"QLoRA's frozen base is NF4; what init={at(config, 'choices.init')} finds would be lost: use init=mse"
        yield Problem("init.method", text)
    for key in ("start", "freeze", "ramp"):
        if is_number(step := at(config, f"schedule.{key}")) and step > 0:
            yield Problem(f"schedule.{key}", "QLoRA fake-quantizes nothing that could be scheduled; use 0")
    if at(config, "adapter.then") is not None:
        return
    text, fix = "merged QLoRA weights are unquantized", "or say what quantizes them: +method@adapter.then=gptq"
    if at(config, "format.name") not in (None, "none"):
        yield Problem("format.name", f"{text}, and no format here writes those; use format=none, {fix}")
    if isinstance(at(config, "recipe.kv"), dict):
        yield Problem("recipe.kv", f"{text}, and judged so; use recipe.kv=null, {fix}")


def data(config: dict[str, Any]) -> Iterator[Problem]:
    """Text comes from somewhere."""
    node = at(config, "data")
    if isinstance(node, dict) and "source" in node and node["source"] is None and node.get("path") is None:
        text = "data without a source is read from a directory; `qat generate out=DIR` makes one, then data.path=DIR"
        yield Problem("data.path", text)


def generate(config: dict[str, Any]) -> Iterator[Problem]:
    """Sequences draw some of their tokens, and some of them train."""
    greedy, length = at(config, "sampling.greedy_tokens"), at(config, "length")
    given = at(config, "prompt.tokens") if at(config, "prompt.path") is not None else 1
    if is_number(given) and is_number(length) and given >= length:
        yield Problem("prompt.tokens", f"{given} of the {length} tokens of a sequence: none would be said; use fewer")
    elif is_number(greedy) and is_number(given) and is_number(length) and greedy >= length - given:
        text = f"{greedy} of the {length - given} tokens after the beginning: none would be drawn; use fewer"
        yield Problem("sampling.greedy_tokens", text)
    shares = [at(config, f"splits.{split}") for split in ("validation", "test")]
    if all(map(is_number, shares)) and sum(shares) >= 1:
        yield Problem("splits", f"validation and test take {sum(shares)} of the sequences; leave some for training")


def export(config: dict[str, Any]) -> Iterator[Problem]:
    """A checkpoint that is converted has one arm, and ends in a file."""
    if config.get("from") is None:
        return
    if config.get("arm") is not None:
        yield Problem("arm", "from=DIR converts a checkpoint, which is one arm of a run already; leave arm out")
    if at(config, "format.name") == "none":
        yield Problem("format.name", "from=DIR is written in a format; name one")


def recipe_quantizes(recipe: Recipe) -> Iterator[Problem]:
    """At least one rule has a weight scheme."""
    if not any(rule.weight for rule in recipe.rules.values()):
        yield Problem("recipe.rules", "no rule has a weight scheme, so nothing would be quantized")


def _weight_rules(recipe: Recipe) -> Iterator[tuple[str, Rule]]:
    for name, rule in recipe.rules.items():
        if rule.weight is not None:
            yield f"recipe.rules.{name}", rule


def weights(recipe: Recipe) -> Iterator[Problem]:
    """A weight is known before it is used: its scales are stored."""
    for where, rule in _weight_rules(recipe):
        assert rule.weight is not None
        if isinstance(rule.weight.granularity, PerToken):
            yield Problem(f"{where}.weight.granularity", "a weight has no tokens; PerToken is for inputs")
        elif rule.weight.dynamic:
            yield Problem(f"{where}.weight.dynamic", "a weight's scale is stored, never dynamic; use dynamic=false")


def kv(recipe: Recipe) -> Iterator[Problem]:
    """A KV cache has one of a few schemes."""
    try:
        if recipe.kv is not None:
            kind_of(recipe.kv)
    except ValueError as error:
        yield Problem("recipe.kv", str(error).removeprefix("recipe.kv: "))


def widths(recipe: Recipe) -> Iterator[Problem]:
    """Every grid has widths to choose from."""
    for where, rule in _weight_rules(recipe):
        assert rule.weight is not None
        try:
            at_width(rule.weight, 8)
        except ValueError as error:
            yield Problem(f"{where}.weight.grid", str(error))


def _trains(method: Any) -> bool:
    """Whether a method, or one that goes on after it, has an estimator."""
    return isinstance(method, dict) and ("estimator" in method or _trains(method.get("then")))


def estimators(config: dict[str, Any], recipe: Recipe) -> Iterator[Problem]:
    """An estimator learns what the schemes have; in `qat ptq` none does, unless the method trains."""
    if config.get("verb") == "ptq" and not _trains(at(config, "method")):
        return
    kinds = {key: str(at(config, f"{key}._target_")).rpartition(".")[2] for key in ("estimator", "input_estimator")}
    for where, rule in _weight_rules(recipe):
        schemes = {"estimator": ("weight", rule.weight), "input_estimator": ("input", rule.input)}
        for key, (part, scheme) in schemes.items():
            if scheme is None or scheme.dynamic:
                continue
            kind = kinds[key]
            if kind in LEARNING and scheme.scale_dtype == E8M0:
                text = f"{kind} learns a scale, but those of {where}.{part} are powers of two; use {key}=clipped"
                yield Problem(key, text)
            if kind == "SEQ" and not (isinstance(scheme.grid, Codebook) and scheme.grid.integer_bits):
                text = f"SEQ is for the codebooks binary, ternary and seq2; {where}.{part} is {scheme}: use {key}=lsq"
                yield Problem(key, text)
            if kind == "LSQPlus" and scheme.symmetric:
                text = f"LSQPlus learns an offset, but {where}.{part} is symmetric; set symmetric=false or {key}=lsq"
                yield Problem(key, text)


def compressed_tensors(recipe: Recipe) -> Iterator[Problem]:
    """What compressed-tensors checkpoints cannot carry."""
    for where, rule in _weight_rules(recipe):
        assert rule.weight is not None
        for part, text in refused(rule.weight, rule.input):
            yield Problem(f"{where}.{part}", f"format=compressed_tensors {text}")
