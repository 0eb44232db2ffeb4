"""PackedLinear: a linear layer whose weight stays packed. For serving; it has no gradient and no parameters."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from qat.kernels import w4a16
from qat.nn.quantized_input import QuantizedInput
from qat.numerics.qtensor import QuantizedTensor


class PackedLinear(nn.Module):
    """`F.linear` by a quantized weight, through `kernels/w4a16.py`; its input is rounded first where a scheme says so.

    Its scales keep their stored dtype: `.to(dtype)`, `.half()` and the like move the layer's device only. It is fed
    from a `QuantizedTensor`, not from a state dict. A weight with a `g_idx` is laid out group after group, and its
    input put in that order at each call: one gather of activations, and every kernel serves it.

    Args:
        tensor: The weight, on the device where the layer shall run.
        bias: `[O]` in the dtype of the activations, or None.
        input: What rounds the input, on the same device, or None.

    Raises:
        ValueError: The weight is not one that is served packed, or the bias does not fit it.
    """

    def __init__(self, tensor: QuantizedTensor, bias: Tensor | None = None, input: QuantizedInput | None = None):
        super().__init__()
        if bias is not None and tuple(bias.shape) != tuple(tensor.shape[:1]):
            raise ValueError(
                f"bias of shape {tuple(bias.shape)}: a weight of shape {tensor.shape} needs {tensor.shape[:1]}"
            )
        weight = w4a16.pack_weight(tensor.in_order())
        self.order = None if tensor.order is None else tensor.order.to(torch.int32)
        self.weight: w4a16.Weight = weight
        self.bias, self.input = bias, input
        self.packed_bytes = weight.nbytes

    def specialize(self, spare: int) -> None:
        """Lays the weight out for the fastest kernel of its device, if that takes at most `spare` bytes more."""
        if isinstance(self.weight, w4a16.PackedWeight):
            self.weight = w4a16.specialize(self.weight, spare)

    @property
    def nbytes(self) -> int:
        """Bytes of weight, bias, the input's scale and the order of in-features as they lie in memory now."""
        more = (self.bias, self.input, self.order)
        return self.weight.nbytes + sum(part.nbytes for part in more if part is not None)

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., I]` -> `[..., O]`, in x's dtype."""
        x = x if self.input is None else self.input(x)
        return w4a16.linear(x if self.order is None else x.index_select(-1, self.order), self.weight, self.bias)

    def extra_repr(self) -> str:
        """Shape and kernel, for `print(model)`."""
        rows, columns = self.weight.shape
        input = "" if self.input is None else f", input {self.input.scheme}"
        return f"{columns} -> {rows}, {type(self.weight).__name__}, {self.nbytes / 2**20:.2f} MiB{input}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        device = fn(torch.empty(0, dtype=torch.int8)).device
        if isinstance(self.weight, w4a16.PackedWeight):
            self.weight = self.weight.to(device)
        elif device.type != "cpu":
            raise ValueError("a weight laid out for a CPU kernel cannot move: build the layer on the other device")
        self.bias = None if self.bias is None else fn(self.bias)
        self.order = None if self.order is None else self.order.to(device)
        self.input = None if self.input is None else self.input.to(device)
        return self
