"""One micro-batch as one CUDA graph: a GPU that runs a small model waits for the host, not for its own arithmetic.

A forward and backward of the demo model is thousands of kernels, most of them shorter than their launch. Captured once
and replayed (https://pytorch.org/docs/stable/notes/cuda.html, "CUDA Graphs"), they are one launch. They are the same
kernels in the same order, so the same bits.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

WARMUP = 3  # runs before the capture: libraries make their handles and workspaces, Triton and inductor compile

TOLERANCE = 0.05  # of the norm: far above what the order of additions does, far below a gradient that is missing

Function = Callable[..., dict[str, Tensor]]


class GraphedLoss:
    """A loss and its gradients, captured with the first batch and replayed for the others.

    The function must not ask the device for anything, and what it reads besides its inputs must stay where it is:
    parameters that an optimizer updates in place do. Autocast is as it is around the constructor.

    Args:
        function: Inputs -> `{"loss": scalar, ...}`; only `"loss"` has a gradient.
        parameters: What the gradient is for.
        inputs: The first inputs, CUDA tensors; later ones have their shapes and dtypes.
    """

    def __init__(self, function: Function, parameters: Sequence[nn.Parameter], *inputs: Tensor):
        device = inputs[0].device
        assert device.type == "cuda", f"CUDA graphs are captured on CUDA devices, not on {device}"
        self._function, self.parameters = function, list(parameters)
        self._inputs = [value.clone() for value in inputs]
        self._graph = torch.cuda.CUDAGraph()
        with torch.autocast("cuda", cache_enabled=False, **_autocast()):  # a cached cast would be no part of the graph
            side = torch.cuda.Stream(device)
            side.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(side):
                for _ in range(WARMUP):
                    self._gradients(function(*self._inputs))
            torch.cuda.current_stream(device).wait_stream(side)
            torch.cuda.empty_cache()  # the capture has memory of its own; what the runs before it used is free again
            with torch.cuda.graph(self._graph):
                self._parts = function(*self._inputs)
                self._grads = self._gradients(self._parts)
        self._parts = {name: value.detach() for name, value in self._parts.items()}

    def __call__(self, *inputs: Tensor) -> dict[str, Tensor]:
        """What the function returns; backward of `"loss"` gives every parameter its gradient, once."""
        for static, value in zip(self._inputs, inputs, strict=True):
            assert static.shape == value.shape, f"captured for {tuple(static.shape)}, called with {tuple(value.shape)}"
            static.copy_(value)
        self._graph.replay()
        parts = {name: value.clone() for name, value in self._parts.items()}
        parts["loss"] = _Replayed.apply(parts["loss"], self._grads, *self.parameters)
        return parts

    def check(self) -> None:
        """Asserts that the function does what was replayed, for the inputs of the last call; it is the last one.

        The loss has to be the same, bit for bit. Attention's gradient is summed by atomic additions, in any order, so
        gradients have to be the same but for a small part of their norm.
        """
        self._graph.replay()
        loss, grads = self._parts["loss"].clone(), [None if g is None else g.clone() for g in self._grads]
        self._graph.reset()
        self._parts, self._grads = {}, []
        torch.cuda.empty_cache()  # both at once would take twice the memory of training
        with torch.autocast("cuda", cache_enabled=False, **_autocast()), torch.enable_grad():
            parts = self._function(*self._inputs)
            expected = self._gradients(parts)
        wanted = parts["loss"].detach()
        assert torch.equal(loss, wanted), f"the replayed loss is {float(loss)}, that of the function {float(wanted)}"
        assert near(grads, expected), "the replayed gradients are not those of the function"

    def _gradients(self, parts: dict[str, Tensor]) -> list[Tensor | None]:
        return list(torch.autograd.grad(parts["loss"], self.parameters, allow_unused=True))


def near(found: Sequence[Tensor | None], expected: Sequence[Tensor | None]) -> bool:
    """Whether gradients are the same but for `TOLERANCE` of their norm, those of vectors and of matrices apart."""
    if [g is None for g in found] != [g is None for g in expected]:
        return False
    pairs = [(a, b) for a, b in zip(found, expected, strict=True) if a is not None and b is not None]
    for shape in {b.dim() for _, b in pairs}:
        some = [(a, b) for a, b in pairs if b.dim() == shape]
        difference = torch.nn.utils.get_total_norm([a - b for a, b in some])
        if not bool(difference <= TOLERANCE * torch.nn.utils.get_total_norm([b for _, b in some])):
            return False
    return True


class _Replayed(torch.autograd.Function):
    """The loss, with gradients that are known already."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, grads: list[Tensor | None], *parameters: Tensor) -> Tensor:
        ctx.grads = grads
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = iter(torch._foreach_mul([g for g in ctx.grads if g is not None], grads[0]))  # new: a replay overwrites
        return None, None, *(None if g is None else next(scaled) for g in ctx.grads)


def _autocast() -> dict[str, Any]:
    return {"dtype": torch.get_autocast_dtype("cuda"), "enabled": torch.is_autocast_enabled("cuda")}
