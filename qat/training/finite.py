"""Whether numbers are finite, and where a model, or its forward, stops being so."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from qat.nn.fake_quantize import FakeQuantize
from qat.training.chunked import chunked_loss
from qat.training.losses import Loss
from qat.training.split import SplitModel


class Doubt:
    """Whether a number is finite: looked at where it lies, at once; asked for later, when the answer has arrived.

    A question put to a GPU stands in line behind all that was launched before it. So its answer is sent when the number
    is made, and whoever asks while the next step runs does not wait for that.

    Args:
        what: What the number is.
        value: A scalar; clipping and the like leave it alone.
        step: The optimizer step that it belongs to.
        batch: Token ids that led to it, for a loss.
    """

    def __init__(self, what: str, value: Tensor, step: int, batch: Tensor | None = None):
        self.what, self.value, self.step, self.batch = what, value, step, batch
        self._finite, self._sent = torch.isfinite(value), None
        if value.is_cuda:
            arrived = torch.empty((), dtype=torch.bool, pin_memory=True)  # else the host waits for the copy
            self._finite = arrived.copy_(self._finite, non_blocking=True)
            self._sent = torch.cuda.Event()
            self._sent.record()

    def finite(self) -> bool:
        """The answer, as soon as it is there."""
        if self._sent is not None:
            self._sent.synchronize()
        return bool(self._finite)


@torch.no_grad()
def first_broken(model: nn.Module) -> str | None:
    """The first parameter of a prepared model that is not finite, or else the first served scale; None if all are."""
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            return name
    for name, module in model.named_modules():
        static = isinstance(module, FakeQuantize) and not module.scheme.dynamic
        if static and not bool(torch.isfinite(module.qparams()[0].float()).all()):
            return f"the scale of {name}"
    return None


@torch.no_grad()
def first_not_finite(model: SplitModel, ids: Tensor) -> str | None:
    """Runs a model once more, not compiled, and names the first module whose output is not finite.

    Modules in order of execution: one inside another answers before the outer one.

    Args:
        model: In the mode, phase and autocast in which the numbers went wrong.
        ids: Token ids `[B, T]`.

    Returns:
        None if every output is finite.
    """
    found: list[str] = []

    def look(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if not found and not all(bool(torch.isfinite(tensor).all()) for tensor in _floats(output)):
                found.append(name or type(module).__name__)

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.model.named_modules()]
    try:
        chunked_loss(Loss(kl=0.0, ce=1.0), model, model.hidden(ids, eager=True), None, None, ids)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _floats(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, dict | list | tuple):
        for part in output.values() if isinstance(output, dict) else output:
            yield from _floats(part)
