"""What a model loses where one unit of it is quantized at one width, and all else is in full precision.

Weights alone: inputs are left in full precision, too. A unit is whatever gets a width of its own. The blocks before the
first one that a unit changes compute what they always do, so they are not run again: on average half of the work.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat.models.structure import Structure
from qat.nn.observers.base import Observer
from qat.numerics.metrics import kl, nll
from qat.numerics.qtensor import QuantizedTensor
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme
from qat.ptq.rtn import rtn

UNITS = ("linear", "stage", "block", "kind")


@dataclass(frozen=True)
class Unit:
    """Modules that are quantized together.

    Attributes:
        name: What the user reads.
        modules: Their names in the model.
        start: The first decoder block that computes something else; 0 if something before the blocks does.
    """

    name: str
    modules: tuple[str, ...]
    start: int


def units(modules: Sequence[str], structure: Structure, by: str) -> list[Unit]:
    """Divides modules into units, in the model's order.

    Args:
        modules: The names of all that are quantized.
        structure: The model's family.
        by: `linear`, each module; `stage`, linears of a block that share their input (q, k, v; gate, up), which
            engines fuse and which therefore need one width there; `block`, a decoder block; `kind`, the modules of one
            name in all blocks. A module outside of the blocks is always a unit of its own.

    Raises:
        ValueError: `by` is none of these.
    """
    if by not in UNITS:
        raise ValueError(f"unit={by!r}: one of {', '.join(UNITS)}")
    found: dict[str, list[str]] = {}
    starts: dict[str, int] = {}
    for module in modules:
        place = re.fullmatch(rf"{re.escape(structure.blocks)}\.(\d+)\.(.+)", module)
        name = _unit(module, place[1], place[2], structure, by) if place else module
        found.setdefault(name, []).append(module)
        starts.setdefault(name, int(place[1]) if place else 0)
    return [Unit(name, tuple(members), starts[name]) for name, members in found.items()]


def _unit(module: str, index: str, kind: str, structure: Structure, by: str) -> str:
    block = f"{structure.blocks}.{index}"
    if by == "stage":
        stage = next((stage for stage in structure.stages if kind in stage), (kind,))
        place = stage[0].rpartition(".")[0]
        return f"{block}.{place}." + "+".join(linear.rpartition(".")[2] for linear in stage)
    return {"linear": module, "block": block, "kind": kind}[by]


def divided(widths: Mapping[str, int], structure: Structure) -> list[str]:
    """Linears that share their input and were given different widths, as far as the modules' names go.

    Engines that fuse them (vLLM, SGLang) read one width for all of them.

    Args:
        widths: Module name to bits.
        structure: The model's family.

    Returns:
        Names of such stages, in the model's order.
    """
    return [u.name for u in units(list(widths), structure, "stage") if len({widths[name] for name in u.modules}) > 1]


class Replay:
    """A full-precision model on fixed windows, ready to be run again from any of its decoder blocks.

    It keeps, for each token, the hidden state at every block's input and the logits: blocks x hidden + vocabulary
    values, in the model's dtype and on its device.

    Args:
        model: The full-precision model; put into eval mode.
        blocks: Path of the list of decoder blocks.
        batches: Token ids, int64 `[B, T]` each.
    """

    @torch.no_grad()
    def __init__(self, model: PreTrainedModel, blocks: str, batches: Sequence[Tensor]):
        self.model = model.eval()
        layers = model.get_submodule(blocks)
        assert isinstance(layers, nn.ModuleList)
        self._layers = list(layers)
        device = next(model.parameters()).device
        self._batches = [batch.to(device) for batch in batches]
        self._inputs: list[list[Tensor]] = []  # batch by batch, block by block
        self._reference: list[Tensor] = []
        self._nll: list[Tensor] = []
        for batch in self._batches:
            with _heard(self._layers) as inputs:
                logits = model(input_ids=batch, use_cache=False).logits
            self._inputs.append(inputs)
            self._reference.append(logits)
            self._nll.append(_nll(logits, batch))

    @torch.no_grad()
    def losses(self, start: int) -> dict[str, list[float]]:
        """What the model as it now is loses against full precision, if nothing before block `start` has changed.

        Returns:
            Nats per token, window by window: `kl` as KL(full precision || now), and `nll` as what it has risen by.
        """
        found: dict[str, list[float]] = {"kl": [], "nll": []}
        for i, batch in enumerate(self._batches):
            with _skipped(self._layers[:start], self._inputs[i][start]):
                logits = self.model(input_ids=batch, use_cache=False).logits
            pairs = zip(self._reference[i], logits, strict=True)  # window by window: never a second copy of all logits
            found["kl"] += [float(kl(full[:-1], own[:-1]).double().mean()) for full, own in pairs]
            found["nll"] += (_nll(logits, batch) - self._nll[i]).tolist()
        return found


def _nll(logits: Tensor, batch: Tensor) -> Tensor:
    """Mean negative log-likelihood of each window, float64 `[B]`."""
    return torch.stack([nll(own[:-1], ids[1:]).double().mean() for own, ids in zip(logits, batch, strict=True)])


@torch.no_grad()
def measure(
    replay: Replay, unit: Unit, schemes: Mapping[str, Scheme], observer: Observer, dtype: torch.dtype
) -> dict[str, list[float]]:
    """Quantizes one unit, round to nearest, and says what that loses; the model is afterwards what it was.

    Args:
        replay: The full-precision model on its windows.
        unit: What is quantized.
        schemes: Scheme of each of its modules.
        observer: Finds ranges.
        dtype: Storage dtype of the scales.

    Returns:
        As `Replay.losses`.

    Raises:
        ValueError: A weight cannot be quantized, or the logits are not finite; names the module or the unit.
    """
    rules = {name: Rule(re.escape(name), schemes[name]) for name in unit.modules}
    tensors = rtn(replay.model, Recipe(rules), [], observer=observer, dtype=dtype).tensors
    with swapped(replay.model, tensors):
        found = replay.losses(unit.start)
    if not all(bool(torch.isfinite(torch.tensor(values)).all()) for values in found.values()):
        raise ValueError(f"{unit.name}: the logits are not finite where it is quantized as {schemes[unit.modules[0]]}")
    return found


@contextmanager
def swapped(model: PreTrainedModel, tensors: Mapping[str, QuantizedTensor]) -> Iterator[None]:
    """While open, the model has dequantized weights in place of some of its own, tied ones wherever they stand."""
    before: list[tuple[nn.Module, str, nn.Parameter]] = []
    try:
        for name, tensor in tensors.items():
            old = model.get_parameter(f"{name}.weight")
            new = nn.Parameter(tensor.dequantize(old.dtype), requires_grad=False)
            for module in model.modules():
                for key, parameter in module._parameters.items():
                    if parameter is old:
                        before.append((module, key, old))
                        module._parameters[key] = new
        yield
    finally:
        for module, key, old in before:
            module._parameters[key] = old


@contextmanager
def _heard(layers: Sequence[nn.Module]) -> Iterator[list[Tensor]]:
    """While open, fills with the hidden states that these blocks are called with."""
    heard: list[Tensor] = []
    handles = [layer.register_forward_pre_hook(lambda _, args: heard.append(args[0])) for layer in layers]
    try:
        yield heard
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _skipped(layers: Sequence[nn.Module], output: Tensor) -> Iterator[None]:
    """While open, these blocks compute nothing: each returns what the last of them is known to."""

    def forward(*_: Any, **__: Any) -> Tensor:
        return output

    for layer in layers:
        vars(layer)["forward"] = forward  # found before the class's own
    try:
        yield
    finally:
        for layer in layers:
            del vars(layer)["forward"]
