"""Modules x recipe -> plan: what will be quantized how, and what will not be and why."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from qat.numerics.allocate import stored_bits
from qat.numerics.granularity import PerChannel, PerTensor
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme


@dataclass(frozen=True)
class PlanRow:
    """What happens to one module.

    Attributes:
        name: The module.
        kind: Its class.
        shape: Shape of its weight.
        rule: The rule that decides, or None if none matches.
        weight: Scheme of the weight; None leaves the module alone.
        input: Scheme of its input.
        reason: Why the module is left alone; empty if it is not.
        shares: A head that is tied to a quantized embedding has no scheme of its own: the embedding, whose codes it
            shares. It is not left alone, and counted once.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rule: str | None
    weight: Scheme | None
    input: Scheme | None
    reason: str
    shares: str | None = None


@dataclass(frozen=True)
class Plan:
    """One row for every module that owns a weight matrix.

    Attributes:
        rows: The modules, in the model's order.
        num_other: Parameters outside these matrices (norms, biases), in elements.
    """

    rows: tuple[PlanRow, ...]
    num_other: int

    @property
    def quantized(self) -> dict[str, Scheme]:
        """Module name to scheme, of the tensors that will be quantized."""
        return {row.name: row.weight for row in self.rows if row.weight is not None}

    def bits_per_weight(self, storage_bits: int = 16) -> float:
        """Bits for each parameter of the whole model: codes, scales, zero points and all that stays unquantized."""
        bits, count = self.num_other * storage_bits, self.num_other
        for row in self.rows:
            size = row.shape[0] * row.shape[1]
            if row.reason.startswith("tied to"):
                continue
            bits += size * storage_bits if row.weight is None else stored_bits(row.weight, row.shape, storage_bits)
            count += size
        return bits / max(count, 1)

    def __str__(self) -> str:
        """A table of runs of like rows: rule, scheme, how many modules, and the reason where one is left alone."""
        groups: dict[tuple[str, str, str], list[PlanRow]] = {}
        for row in self.rows:
            what = str(row.weight or ("shared" if row.shares else "left alone"))
            what += f", input {row.input}" if row.input else ""
            groups.setdefault((row.rule or "-", what, row.reason), []).append(row)
        lines = [f"{'rule':12} {'scheme':16} {'modules':>7} {'weights':>13}  which"]
        for (rule, what, reason), rows in groups.items():
            size = sum(row.shape[0] * row.shape[1] for row in rows)
            which = rows[0].name if len(rows) == 1 else f"{rows[0].name} ... {rows[-1].name}"
            lines.append(f"{rule:12} {what:16} {len(rows):7} {size:13,}  {which}{f' ({reason})' if reason else ''}")
        lines.append(f"{self.bits_per_weight():.3f} bits per weight over the whole model")
        return "\n".join(lines)


def match(model: nn.Module, recipe: Recipe) -> Plan:
    """Finds the rule that decides for every module that owns a weight matrix.

    Raises:
        ValueError: A rule matches no module; a rule with a scheme decides for something other than an `nn.Linear` or
            an `nn.Embedding`, for a tied head alone or otherwise than for its embedding; a group does not divide a
            module's in-features; or nothing at all would be quantized.
    """
    modules = {name: m for name, m in model.named_modules() if _weight(m) is not None}
    for key, rule in recipe.rules.items():
        if not any(rule.matches(name) for name in modules):
            raise ValueError(
                f"recipe.rules.{key}: match={rule.match!r} matches no module; weight matrices here: {_sample(modules)}"
            )
    owners: dict[int, str] = {}
    rows: dict[str, PlanRow] = {}
    for name, module in modules.items():
        owner = owners.setdefault(id(module.weight), name)
        rows[name] = _row(name, module, recipe) if owner == name else _tied(name, module, recipe, rows[owner])
    if not any(row.weight for row in rows.values()):
        raise ValueError(f"the recipe quantizes no module; weight matrices here: {_sample(modules)}")
    matrices = {id(m.weight) for m in modules.values()}
    return Plan(tuple(rows.values()), sum(p.numel() for p in model.parameters() if id(p) not in matrices))


def _row(name: str, module: nn.Module, recipe: Recipe) -> PlanRow:
    key, rule, kind, shape = *_decides(recipe, name), type(module).__name__, tuple(_matrix(module).shape)
    if rule is None or rule.weight is None:
        reason = "no rule matches" if rule is None else f"rule {key}: weight=null"
        return PlanRow(name, kind, shape, key, None, None, reason)
    if not isinstance(module, nn.Linear) and type(module) is not nn.Embedding:
        raise ValueError(
            f"{name}: rule {key} would quantize a {kind}; only nn.Linear and nn.Embedding can be. Add a later rule "
            f"that matches it, with weight=null"
        )
    if isinstance(module, nn.Embedding):
        _check_lookup(name, module, key, rule.input)
    _check(name, shape, rule.weight, rule.input)
    return PlanRow(name, kind, shape, key, rule.weight, rule.input, "")


def _tied(name: str, module: nn.Module, recipe: Recipe, owner: PlanRow) -> PlanRow:
    """The row of a module whose weight is another's: it follows a quantized embedding if it is a linear."""
    key, rule, kind, tied = *_decides(recipe, name), type(module).__name__, f"tied to {owner.name}"
    if owner.weight is None:
        if rule is None or rule.weight is None:
            return PlanRow(name, kind, owner.shape, key, None, None, tied)
        follow = f"Let a rule match {owner.name}, which it then follows, or add" if owner.kind == "Embedding" else "Add"
        raise ValueError(
            f"{name}: its weight is {tied}, which the recipe does not quantize. {follow} a later rule that matches "
            f"{name}, with weight=null"
        )
    if owner.kind != "Embedding" or not isinstance(module, nn.Linear):
        raise ValueError(
            f"{owner.name}: its weight is tied to that of {name}, a {kind}; only an embedding and an nn.Linear can "
            f"share codes. Add a later rule that matches {owner.name}, with weight=null"
        )
    if rule is not None and rule.weight not in (None, owner.weight):
        raise ValueError(
            f"{name}: its weight is {tied}, which rule {owner.rule} quantizes as {owner.weight}, but rule {key} says "
            f"{rule.weight}; they share their codes. Give both one scheme, or set weight=null in rule {key}"
        )
    input = None if rule is None else rule.input
    _check(name, owner.shape, owner.weight, input)
    return PlanRow(name, kind, owner.shape, key, None, input, f"{tied}, shares its codes", owner.name)


def _decides(recipe: Recipe, name: str) -> tuple[str | None, Rule | None]:
    return recipe.rule_for(name) or (None, None)


def _check_lookup(name: str, module: nn.Embedding, key: str | None, input: Scheme | None) -> None:
    if input is not None:
        raise ValueError(
            f"{name}: rule {key} has an input scheme, but the input of an embedding is token ids; use null"
        )
    for option in ("max_norm", "scale_grad_by_freq", "sparse"):
        if getattr(module, option):
            raise ValueError(
                f"{name}: an embedding with {option}={getattr(module, option)} cannot be quantized. Add a later rule "
                f"that matches it, with weight=null"
            )


def _check(name: str, shape: tuple[int, ...], weight: Scheme, input: Scheme | None) -> None:
    if weight.dynamic:
        raise ValueError(f"{name}: a dynamic scale is never stored; set dynamic=false on the weight's scheme")
    try:
        weight.granularity.scale_shape(shape)
        if input is not None:
            input.granularity.scale_shape((1, shape[1]))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    if input is not None and not input.dynamic and not isinstance(input.granularity, PerTensor):
        raise ValueError(
            f"{name}: static input scheme {input}: the tokens of the calibration are not those to come; use PerTensor, "
            f"or set dynamic=true"
        )
    if input is not None and isinstance(input.granularity, PerChannel):
        raise ValueError(f"{name}: input scheme {input}: an input has no output channels; use PerToken or PerTensor")


def _matrix(module: nn.Module) -> nn.Parameter:
    weight = _weight(module)
    assert weight is not None
    return weight


def _weight(module: nn.Module) -> nn.Parameter | None:
    weight = module._parameters.get("weight")
    return weight if weight is not None and weight.dim() >= 2 else None


def _sample(modules: Mapping[str, nn.Module]) -> str:
    names = list(modules)
    return ", ".join(names[:3]) + (f" ... {names[-1]} ({len(names)} in all)" if len(names) > 3 else "")
