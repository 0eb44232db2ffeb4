"""What a format cannot carry, from the recipe and the model's shapes: the twin of `check_scheme`, without torch."""

from collections.abc import Iterator

from qat.cli.model_file import ModelFacts
from qat.cli.problem import Problem
from qat.formats.ct_args import refused
from qat.numerics.granularity import PerTensor
from qat.numerics.grid import IntGrid
from qat.numerics.recipe import Recipe
from qat.numerics.scheme import Scheme, integers

BITS = {"gptq": (2, 3, 4, 8), "awq": (4,), "gguf": (4, 8)}
MULTIPLES = {"gptq": (32, 32), "awq": (8, 1), "gguf": (1, 32)}  # of rows and columns: what fills a word


def carries(name: str, recipe: Recipe) -> Iterator[Problem]:
    """What a format other than compressed-tensors cannot say of a recipe."""
    if name not in BITS:
        return
    if recipe.kv is not None:
        yield Problem("recipe.kv", f"format={name} has no word for it; use kv=null or format=compressed_tensors")
    sizes = set()
    for key, rule in recipe.rules.items():
        if rule.weight is None:
            continue
        where = f"recipe.rules.{key}"
        if rule.input is not None:
            text = f"format={name} carries weights only, not the input scheme {rule.input}"
            yield Problem(f"{where}.input", f"{text}; use format={_other(rule.weight, rule.input)} or input=null")
        yield from _weight(name, where, integers(rule.weight), _other(rule.weight, rule.input))
        sizes.add(getattr(rule.weight.granularity, "group_size", None))
    if name == "awq" and len(sizes) > 1:
        text = "format=awq has one group size for the whole file; give every rule the same, or use format=gptq"
        yield Problem("recipe.rules", text)


def _other(weight: Scheme, input: Scheme | None) -> str:
    """The format that carries what a weight-only one does not."""
    return "none" if any(refused(weight, input)) else "compressed_tensors"


def _weight(name: str, where: str, scheme: Scheme, other: str) -> Iterator[Problem]:
    if not isinstance(scheme.grid, IntGrid) or scheme.grid.bits not in BITS[name]:
        bits = ", ".join(map(str, BITS[name]))
        text = f"format={name} carries integers of {bits} bits, not {scheme}; use format={other}"
        yield Problem(f"{where}.weight.grid", text)
    elif name == "gguf" and scheme.grid.bits == 8 and not scheme.symmetric:
        yield Problem(f"{where}.weight.symmetric", "format=gguf has no zero points at 8 bits; use symmetric=true")
    if name == "gguf":
        if getattr(scheme.granularity, "group_size", 32) % 32:
            text = f"format=gguf has a scale for every 32 in-features; groups of {scheme.granularity} are none of these"
            yield Problem(f"{where}.weight.granularity", text)
    elif isinstance(scheme.granularity, PerTensor):
        text = f"format={name} has scales per group or channel, not per tensor; use PerChannel"
        yield Problem(f"{where}.weight.granularity", text)


def fits(name: str, recipe: Recipe, facts: ModelFacts) -> Iterator[Problem]:
    """Linears whose sizes do not fill a format's words; the first of each rule."""
    rows, columns = MULTIPLES.get(name, (1, 1))
    said = set()
    for module, shape in facts.linears.items():
        hit = recipe.rule_for(module)
        if hit is None or hit[1].weight is None or hit[0] in said or not (shape[0] % rows or shape[1] % columns):
            continue
        said.add(hit[0])
        text = f"{module} is {list(shape)}; format={name} packs multiples of [{rows}, {columns}]"
        yield Problem(f"recipe.rules.{hit[0]}.match", f"{text}: add a later rule for it with weight=null")
