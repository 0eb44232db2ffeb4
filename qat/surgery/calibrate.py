"""calibrate: static ranges of activations, from batches that the model sees; and what such batches must not be."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from qat.nn.fake_quantize import FakeQuantize, Phase


def needing(model: nn.Module) -> dict[str, FakeQuantize]:
    """The fake-quantizations whose ranges calibration finds, by module name: those that keep a running range."""
    modules = {name: m for name, m in model.named_modules() if isinstance(m, FakeQuantize)}
    return {name: m for name, m in modules.items() if hasattr(m, "seen")}


def check_batches(batches: Sequence[Tensor]) -> None:
    """Refuses batches that cannot calibrate anything.

    A single token over and over (padding, one token alone) gives every linear one direction to keep, whatever the
    length: attention over equal values is that value.

    Raises:
        ValueError: There are none, they are not token ids, or all of them are the same token.
    """
    if not sum(batch.numel() for batch in batches):
        raise ValueError("there are no calibration batches; give calibration.samples and seq_len of 1 or more")
    if strays := [batch.dtype for batch in batches if batch.is_floating_point()]:
        raise ValueError(f"a calibration batch holds {strays[0]}; token ids are integers")
    lowest, highest = min(int(batch.min()) for batch in batches), max(int(batch.max()) for batch in batches)
    if lowest == highest:
        raise ValueError(
            f"the calibration batches hold nothing but token {lowest}: padding, or one token over and over, says "
            f"nothing about activations; give windows of real text (data.path, calibration.samples)"
        )


@contextmanager
def calibrating(model: nn.Module) -> Iterator[int]:
    """While open, every static range of an input follows what passes; yields how many there are.

    Raises:
        ValueError: An activation is not finite, or nothing has passed in the end; names the module.
    """
    found = needing(model)
    before = {name: (m.phase, m.training, m.strength) for name, m in found.items()}
    for module in found.values():
        module.seen.zero_()
        module.train()
        module.phase, module.strength = Phase.OBSERVE, 0.0
    try:
        yield len(found)
    finally:
        for name, module in found.items():
            module.phase, module.training, module.strength = before[name]
    for name, module in found.items():
        if int(module.seen) == 0:
            raise ValueError(f"{name}: no batch reached it, so its static range is not known; give calibration batches")


@torch.no_grad()
def calibrate(model: nn.Module, batches: Iterable[Tensor]) -> int:
    """Runs batches through a prepared model, and takes from them every static range of an input.

    All weights are fake-quantized meanwhile, all inputs not yet: ranges are those of the activations that the quantized
    weights compute. Ranges are gathered over all batches and reduced over ranks. Modes and phases come back unchanged.

    Args:
        model: After `prepare`, or with the inputs of `convert.apply`.
        batches: Token ids, `[B, T]` each.

    Returns:
        How many modules were calibrated; 0, and nothing is run, where every range is dynamic.

    Raises:
        ValueError: An activation is not finite, names the module; or batches are none that calibrate.
    """
    device, batches = next(model.parameters()).device, list(batches)
    if needing(model):
        check_batches(batches)
    with calibrating(model) as count:
        for batch in batches if count else ():
            model(input_ids=batch.to(device), use_cache=False)
    return count
