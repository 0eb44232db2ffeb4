"""walk: through a model's decoder blocks one at a time, each with the inputs that reach it.

PTQ methods, and whatever else works block by block, share it. Memory holds the model, one private copy of one block,
and the hidden states at one block boundary. Every block gets the keyword arguments that the model itself hands to it.
"""

import copy
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat.numerics.qtensor import QuantizedTensor
from qat.numerics.recipe import Recipe

Row = dict[str, Any]


@dataclass
class Changes:
    """What was done to some modules.

    Attributes:
        tensors: Module name to quantized weight.
        folded: Parameter name to changed unquantized tensor, in the storage dtype.
        layers: One row for each module, for reports: name, loss, fallback, seconds, ...
    """

    tensors: dict[str, QuantizedTensor] = field(default_factory=dict)
    folded: dict[str, Tensor] = field(default_factory=dict)
    layers: list[Row] = field(default_factory=list)

    def add(self, other: "Changes") -> None:
        """Takes over what another holds."""
        self.tensors |= other.tensors
        self.folded |= other.folded
        self.layers += other.layers


@dataclass(frozen=True)
class Block:
    """One decoder block at its turn.

    Attributes:
        name: Its path in the model; names in `Changes` are absolute.
        module: A private copy, free to change. What it computes afterwards is what later blocks see, if `walk` was
            asked to propagate changes.
        inputs: Hidden states `[B, T, H]`, a batch each.
        kwargs: Keyword arguments of the block, a batch each.
    """

    name: str
    module: nn.Module
    inputs: list[Tensor]
    kwargs: list[dict[str, Any]]

    def run(self) -> Iterator[Tensor]:
        """Output of the block as it now is, batch by batch."""
        for hidden, kwargs in zip(self.inputs, self.kwargs, strict=True):
            yield _hidden(self.module(hidden, **kwargs))


@torch.no_grad()
def walk(
    model: PreTrainedModel,
    batches: list[Tensor],
    blocks: str,
    visit: Callable[[Block], Changes],
    propagate: bool,
    recipe: Recipe,
    store: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Changes:
    """Visits every decoder block in order.

    Args:
        model: Left as it is.
        batches: Token ids, `[B, T]` each.
        blocks: Path of the list of blocks.
        visit: May change its private block, and says what it did.
        propagate: Whether later blocks see what changed blocks compute, or what the original ones do.
        recipe: Schemes of the stored tensors, for a resumed walk.
        store: A directory in which each finished block is kept; a walk that finds some there goes on after them.
        progress: Called with (blocks done, blocks in all).

    Returns:
        The changes of all blocks together.

    Raises:
        ValueError: Hidden states stop being finite; names the block.
    """
    layers = model.get_submodule(blocks)
    assert isinstance(layers, nn.ModuleList)
    inputs, kwargs = _capture(model, layers, batches)
    changes, done = Changes(), 0
    if store is not None:
        store.mkdir(parents=True, exist_ok=True)
        done, inputs = _restore(store, changes, recipe, inputs)
    for index in range(done, len(layers)):
        block = Block(f"{blocks}.{index}", copy.deepcopy(layers[index]), inputs, kwargs[index])
        found = visit(block)
        changes.add(found)
        source = block if propagate else Block(block.name, layers[index], inputs, kwargs[index])
        inputs = list(source.run()) if index + 1 < len(layers) else []
        if not all(bool(torch.isfinite(hidden).all()) for hidden in inputs):
            raise ValueError(f"{block.name}: its output is not finite on the calibration data; the model is damaged")
        if store is not None:
            _keep(store, index, found, inputs)
        if progress is not None:
            progress(index + 1, len(layers))
    return changes


class _Recorder(nn.Module):
    """Stands in for a block: keeps what it is called with, and hands the hidden states on."""

    def __init__(self, block: nn.Module):
        super().__init__()
        self._block = (block,)  # in a tuple: no submodule
        self.inputs: list[Tensor] = []
        self.kwargs: list[dict[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._block[0], name)  # models read attributes of their blocks, such as attention_type

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        self.inputs.append(hidden)
        self.kwargs.append(kwargs)
        return hidden


def _capture(
    model: PreTrainedModel, layers: nn.ModuleList, batches: list[Tensor]
) -> tuple[list[Tensor], list[list[dict[str, Any]]]]:
    blocks = list(layers)
    recorders = [_Recorder(block) for block in blocks]
    device = next(model.parameters()).device
    try:
        for i, recorder in enumerate(recorders):
            layers[i] = recorder
        for batch in batches:
            model.base_model(input_ids=batch.to(device), use_cache=False)
    finally:
        for i, block in enumerate(blocks):
            layers[i] = block
    return recorders[0].inputs, [recorder.kwargs for recorder in recorders]


def _hidden(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def _keep(store: Path, index: int, found: Changes, inputs: list[Tensor]) -> None:
    parts = {f"folded/{name}": value for name, value in found.folded.items()}
    for name, tensor in found.tensors.items():
        values = {"codes": tensor.codes, "scale": tensor.scale, "zero_point": tensor.zero_point}
        values["global_scale"] = tensor.global_scale
        parts |= {f"{key}/{name}": value for key, value in values.items() if value is not None}
    parts |= {f"stream/{i:06}": hidden for i, hidden in enumerate(inputs)}
    part = store / ".part"
    save_file({k: v.contiguous() for k, v in parts.items()}, part, {"layers": json.dumps(found.layers)})
    part.replace(store / f"block-{index:04}.safetensors")
    if index:  # only the newest block needs its stream
        _drop_stream(store / f"block-{index - 1:04}.safetensors")


def _drop_stream(file: Path) -> None:
    with safe_open(file, framework="pt") as handle:
        metadata = handle.metadata()
    part = file.with_name(".part")
    save_file({k: v for k, v in load_file(file).items() if not k.startswith("stream/")}, part, metadata)
    part.replace(file)


def _restore(store: Path, changes: Changes, recipe: Recipe, inputs: list[Tensor]) -> tuple[int, list[Tensor]]:
    files = sorted(store.glob("block-*.safetensors"))
    for index, file in enumerate(files):
        assert file.name == f"block-{index:04}.safetensors", f"{file}: a block before it is missing"
        parts = {k: v.to(inputs[0].device) for k, v in load_file(file).items()}
        with safe_open(file, framework="pt") as handle:
            layers = json.loads(handle.metadata()["layers"])
        changes.add(Changes(_tensors(parts, recipe), _section(parts, "folded"), layers))
        if index + 1 == len(files):
            inputs = list(_section(parts, "stream").values())
    return len(files), inputs


def _tensors(parts: Mapping[str, Tensor], recipe: Recipe) -> dict[str, QuantizedTensor]:
    result = {}
    for name, codes in _section(parts, "codes").items():
        hit = recipe.rule_for(name)
        assert hit is not None
        assert hit[1].weight is not None
        scale, zero_point, g = (parts.get(f"{part}/{name}") for part in ("scale", "zero_point", "global_scale"))
        assert scale is not None
        result[name] = QuantizedTensor(codes, scale, zero_point, hit[1].weight, tuple(codes.shape), g)
    return result


def _section(parts: Mapping[str, Tensor], section: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{section}/"): v for k, v in sorted(parts.items()) if k.startswith(f"{section}/")}
