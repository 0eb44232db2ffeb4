"""LowRank: W + s B A, of which A and B train, as one opaque operator in full fp32.

LoRA (arXiv:2106.09685, equation 3) has h = W x + s B A x with s = alpha / r (section 4.1). Others train FQ(W) x + s B
A x and ship Q(W + s B A), which rounds what training never rounded. Here the sum is fake-quantized, FQ(W + s B A) x,
so that merging is the identity: `convert` takes the codes of the same sum, made by the same operator of the same
tensors. Inside it autocast and TF32 are off, and inductor does not look into it: a product of matrices that is
computed in another way is rounded in another way, and codes would move. There is no dropout: what is dropped would not
be served.

A starts Kaiming-uniform as in the authors' code (the paper says Gaussian), B at 0: step 0 is that of plain QAT.

Cost for a linear `[O, I]`: 2 O I r flops for each forward, again in backward, where the sum is made anew rather than
kept (it would be 4 bytes for each weight of the model), and 4 O I r flops for the gradients of A and B; none of them
grows with the number of tokens. Gradients and optimizer states are those of r (O + I) numbers instead of O I; W itself
stays in memory in fp32.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qat.nn.fake_quantize import FakeQuantize


class LowRank(nn.Module):
    """The trained part of an adapted linear.

    Args:
        out_features: O.
        in_features: I.
        rank: r.
        alpha: s = alpha / r.
        generator: Random numbers for A, on the CPU: the same on every device.
        device: Where A `[r, I]` and B `[O, r]` are.
    """

    def __init__(
        self,
        out_features: int,
        in_features: int,
        rank: int,
        alpha: float,
        generator: torch.Generator,
        device: torch.device | None = None,
    ):
        super().__init__()
        self.scaling = alpha / rank
        start = nn.init.kaiming_uniform_(torch.empty(rank, in_features), a=math.sqrt(5), generator=generator)
        self.A = nn.Parameter(start.to(device))
        self.B = nn.Parameter(torch.zeros(out_features, rank, device=device))

    def merged(self, weight: Tensor) -> Tensor:
        """`W + s B A`, shape and dtype of `weight`."""
        return _Merge.apply(weight, self.B, self.A, self.scaling)

    def extra_repr(self) -> str:
        """One line for `print(model)`."""
        return f"rank={self.A.shape[0]}, scaling={self.scaling:g}"


@torch.library.custom_op("qat::add_low_rank", mutates_args=())
def _add_low_rank(weight: Tensor, b: Tensor, a: Tensor, scaling: float) -> Tensor:
    with _full_precision(weight.device.type):
        return torch.addmm(weight, b, a, alpha=scaling)


@_add_low_rank.register_fake
def _(weight, b, a, scaling):
    return torch.empty_like(weight)


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, b: Tensor, a: Tensor, scaling: float) -> Tensor:
        ctx.save_for_backward(b, a)
        ctx.scaling = scaling
        return _add_low_rank(weight, b, a, scaling)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        b, a = ctx.saved_tensors
        grad = grads[0]
        return grad if ctx.needs_input_grad[0] else None, grad @ a.T * ctx.scaling, b.T @ grad * ctx.scaling, None


@contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    """Matrix products in the dtype of their operands, without autocast and TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def frozen(model: nn.Module) -> dict[str, Tensor]:
    """Entries of an adapted model's state dict that training leaves alone, so that no checkpoint needs them.

    Parameters without a gradient and buffers, those of fake-quantization excepted; empty for a model without adapters.
    """
    modules = list(model.modules())
    if not any(isinstance(module, LowRank) for module in modules):
        return {}
    needed = {id(p) for p in model.parameters() if p.requires_grad}
    for module in modules:
        if isinstance(module, FakeQuantize):
            needed |= {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    return {name: value for name, value in model.state_dict(keep_vars=True).items() if id(value) not in needed}


def checksum(tensor: Tensor) -> int:
    """Sum of a tensor's words, the same on every device: tells another model's tensor from this one."""
    words = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()]
    return int(tensor.detach().view(words).sum(dtype=torch.int64))
