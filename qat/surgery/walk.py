"""walk: through a model's decoder blocks one at a time, each with the inputs that reach it.

PTQ methods and block-wise training share it. Memory holds the model, one private copy of one block, and the hidden
states at one block boundary: those of the quantized model, and beside them, where blocks are held to what they should
compute, those of the full-precision model. Every block gets the keyword arguments that the model itself hands to it.
A model that is larger than a GPU stays on the CPU: `device` then holds one block of it, and its private copy.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat.nn.windows import whole_windows
from qat.numerics.recipe import Recipe
from qat.surgery.calibrate import check_batches
from qat.surgery.changes import Changes, write


@dataclass(frozen=True)
class Block:
    """One decoder block at its turn. The streams are the walk's own: nobody keeps them beyond the visit.

    Attributes:
        name: Its path in the model; names in `Changes` are absolute.
        module: A private copy, free to change. What it computes afterwards is what later blocks see, if `walk` was
            asked to propagate changes.
        inputs: Hidden states `[B, T, H]`, a batch each.
        kwargs: Keyword arguments of the block, a batch each.
        original: The block as it was, not to be changed.
        full: Hidden states of the full-precision model, a batch each: what the original block computes there, or what
            it gets; empty if not asked for.
    """

    name: str
    module: nn.Module
    inputs: list[Tensor]
    kwargs: list[dict[str, Any]]
    original: nn.Module
    full: list[Tensor] = field(default_factory=list)

    def output(self, index: int, module: nn.Module | None = None, stream: list[Tensor] | None = None) -> Tensor:
        """What the block as it now is, or another in its place, makes of one batch, of the inputs or of another stream.

        On the module's device.
        """
        module = module or self.module
        hidden = (self.inputs if stream is None else stream)[index].to(next(module.parameters()).device)
        output = module(hidden, **self.kwargs[index])
        return output if isinstance(output, Tensor) else output[0]

    def run(self) -> Iterator[Tensor]:
        """Output of the block as it now is, batch by batch."""
        for index in range(len(self.inputs)):
            yield self.output(index)


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
    full: Literal["inputs", "outputs", False] = False,
    offload: bool = False,
    device: torch.device | str | None = None,
) -> Changes:
    """Visits every decoder block in order.

    Args:
        model: Left as it is.
        batches: Token ids, `[B, T]` each, without padding.
        blocks: Path of the list of blocks.
        visit: May change its private block, and says what it did. It runs without gradients; it may enable them.
        propagate: Whether later blocks see what changed blocks compute, or what the original ones do.
        recipe: Schemes of the stored tensors, for a resumed walk.
        store: A directory in which each finished block is kept; a walk that finds some there goes on after them,
            whatever made them: another method or other knobs want another store.
        progress: Called with (blocks done, blocks in all).
        full: Whether a second stream, the full-precision model's, goes along, and which side of it blocks get.
        offload: Whether hidden states wait on the CPU.
        device: Where blocks are visited, and hidden states wait; None: where the model is.

    Returns:
        The changes of all blocks together, where the model is.

    Raises:
        ValueError: Batches are none that calibrate; or a tensor of a block, or its hidden states, are not finite; names
            it.
    """
    check_batches(batches)
    layers = model.get_submodule(blocks)
    assert isinstance(layers, nn.ModuleList)
    home = next(model.parameters()).device
    there = home if device is None else torch.device(device)
    inputs, kwargs = _capture(model, layers, batches, torch.device("cpu") if offload else there)
    stream = list(inputs) if full else []
    changes, done = Changes(), 0
    if store is not None:
        store.mkdir(parents=True, exist_ok=True)
        done = _restore(store, changes, recipe, inputs, stream, len(layers), home)
    for index in range(done, len(layers)):
        last, name = index + 1 == len(layers), f"{blocks}.{index}"
        _check_finite(name, layers[index])
        module, arguments = layers[index], kwargs[index]
        if device is not None:
            module, arguments = copied(module, there), _moved(arguments, there)
        original = Block(name, module, stream, arguments, module)
        if full == "outputs":
            _advance(original, "its full-precision output")
        block = Block(name, copy.deepcopy(module), inputs, arguments, module, stream)
        found = visit(block) if device is None else visit(block).to(home)
        changes.add(found)
        if full == "inputs" and not last:
            _advance(original, "its full-precision output")
        if not last:
            source = block.module if propagate else module
            _advance(Block(name, source, inputs, arguments, source), "its output")
        if store is not None:
            _keep(store, index, found, {} if last else {"inputs": inputs, "full": stream})
        if progress is not None:
            progress(index + 1, len(layers))
    return changes


def copied(module: nn.Module, device: torch.device) -> nn.Module:
    """A copy of a module on a device; its tensors go straight there."""
    parts = [*module.parameters(), *module.buffers()]
    there: list[Tensor] = [
        nn.Parameter(part.detach().to(device, copy=True), part.requires_grad)
        if isinstance(part, nn.Parameter)
        else part.to(device, copy=True)
        for part in parts
    ]
    return copy.deepcopy(module, {id(part): moved for part, moved in zip(parts, there, strict=True)})


def _check_finite(name: str, module: nn.Module) -> None:
    """Raises ValueError if a parameter of the block is not finite, by name, before anything is made of it."""
    parameters = dict(module.named_parameters())
    finite = torch.stack([torch.isfinite(parameter).all() for parameter in parameters.values()]).tolist()
    if strays := [key for key, fine in zip(parameters, finite, strict=True) if not fine]:
        raise ValueError(f"{name}.{strays[0]}: not finite; the model is damaged")


def _moved(value: Any, device: torch.device) -> Any:
    """Arguments of a block on a device: tensors, in whatever lists, tuples and dictionaries they come."""
    if isinstance(value, dict):
        return {key: _moved(part, device) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(part, device) for part in value)
    return value.to(device) if isinstance(value, Tensor) else value


def _advance(block: Block, what: str) -> None:
    """Replaces a stream by what the block makes of it, batch by batch."""
    finite = []
    for index in range(len(block.inputs)):
        hidden = block.output(index)
        finite.append(torch.isfinite(hidden).all())
        block.inputs[index] = hidden.to(block.inputs[index].device)
    if finite and not bool(torch.stack(finite).all()):  # one look at all batches: a GPU need not wait for the host
        raise ValueError(f"{block.name}: {what} is not finite on the calibration data; the model is damaged")


class _Recorder(nn.Module):
    """Stands in for a block: keeps what it is called with, and hands the hidden states on.

    Args:
        block: The block.
        place: Where hidden states are kept; None: not at all.
        last: Whether one token is enough for what is behind it, since nobody looks at that.
    """

    def __init__(self, block: nn.Module, place: torch.device | None, last: bool):
        super().__init__()
        self._place, self._last = place, last
        self._block = (block,)  # in a tuple: no submodule
        self.inputs: list[Tensor] = []
        self.kwargs: list[dict[str, Any]] = []

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._block[0], name)  # models read attributes of their blocks, such as attention_type

    def forward(self, hidden: Tensor, **kwargs: Any) -> Tensor:
        if self._place is not None:
            self.inputs.append(hidden.to(self._place))
        self.kwargs.append(kwargs)
        return hidden[:, :1] if self._last else hidden


def _capture(
    model: PreTrainedModel, layers: nn.ModuleList, batches: list[Tensor], place: torch.device
) -> tuple[list[Tensor], list[list[dict[str, Any]]]]:
    blocks = list(layers)
    recorders = [_Recorder(block, None if i else place, i + 1 == len(blocks)) for i, block in enumerate(blocks)]
    device = next(model.parameters()).device
    try:
        for i, recorder in enumerate(recorders):
            layers[i] = recorder
        with whole_windows(model):
            for batch in batches:
                model.base_model(input_ids=batch.to(device), use_cache=False)
    finally:
        for i, block in enumerate(blocks):
            layers[i] = block
    return recorders[0].inputs, [recorder.kwargs for recorder in recorders]


def _keep(store: Path, index: int, found: Changes, streams: dict[str, list[Tensor]]) -> None:
    """A finished block, and the streams that the next one needs: written before it, so that none is without its own."""
    parts = {f"{name}/{i:06}": hidden for name, stream in streams.items() for i, hidden in enumerate(stream)}
    if parts:
        write(_stream(store, index + 1), parts)
    found.save(store / f"block-{index:04}.safetensors")
    _stream(store, index).unlink(missing_ok=True)


def _restore(
    store: Path,
    changes: Changes,
    recipe: Recipe,
    inputs: list[Tensor],
    full: list[Tensor],
    blocks: int,
    device: torch.device,
) -> int:
    """Takes over finished blocks, and their streams in place; how many blocks there are."""
    files = sorted(store.glob("block-*.safetensors"))
    for index, file in enumerate(files):
        assert file.name == f"block-{index:04}.safetensors", f"{file}: a block before it is missing"
        changes.add(Changes.load(file, recipe, device))
    if 0 < len(files) < blocks:
        parts = load_file(_stream(store, len(files)))
        for name, stream in {"inputs": inputs, "full": full}.items():
            stream[:] = [parts[f"{name}/{i:06}"].to(hidden.device) for i, hidden in enumerate(stream)]
    return len(files)


def _stream(store: Path, index: int) -> Path:
    return store / f"stream-{index:04}.safetensors"
