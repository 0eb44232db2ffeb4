"""QLoRALinear: a frozen base of 4-bit codes, and an adapter beside it in the compute dtype.

QLoRA (arXiv:2305.14314, equation 5), in a compute dtype D (autocast's, else fp32):

    y = x W_D^T + s (dropout(x) A^T) B^T + b,    W_D = round_D(levels[codes] * scale)

The base is round-to-nearest on the paper's NF4 levels, absmax for each group, codes packed eight to a word, scales in
the storage dtype: 4.25 bits for each weight with bf16 scales and groups of 64. Left out are the double quantization of
the scales (it would save 0.12 bits more) and paged optimizer states. W_D is dequantized for each forward and again for
each backward, never kept.

Merging gives W' = round_storage(W + s B A), W = W_fp32, summed in fp32: an unquantized matrix. It is not what was
trained bit for bit. With u half the storage dtype's distance from 1 to the next number (2^-8 for bf16, 2^-24 for
fp32),

    |W' - (W + s B A)| <= u |W + s B A|,    |y' - y| <= u |x| |W + s B A|^T + rounding of D's products

elementwise, and where W' is quantized afterwards every weight moves by up to half a step again
(`tests/nn/test_qlora.py`). LoRA-QAT (`lora.py`) has 0 in both places.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qat.nn.linear import compute_dtype
from qat.nn.lora import LowRank
from qat.numerics.affine import dequantize, rtn
from qat.numerics.granularity import PerGroup
from qat.numerics.grid import Codebook
from qat.numerics.packing import pack, unpack
from qat.numerics.scheme import Scheme

NF4 = Codebook("nf4")


class QLoRALinear(nn.Module):
    """A linear on a frozen NF4 base.

    Args:
        linear: What it replaces; its weight is read, its bias taken over.
        adapter: A and B.
        group_size: Elements that share a scale.
        dropout: Fraction of the adapter's inputs that is zeroed in training.
        storage: Dtype of the scales.

    Raises:
        ValueError: The group size does not divide the in-features, or the weight is not finite.
    """

    words: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear, adapter: LowRank, group_size: int, dropout: float, storage: torch.dtype):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        codes, scale, _ = rtn(linear.weight.detach(), Scheme(NF4, PerGroup(group_size)), storage)
        self.register_buffer("words", pack(codes, NF4.bits))
        self.register_buffer("scale", scale)
        self.bias, self.adapter, self.dropout = linear.bias, adapter, dropout
        self.train(linear.training)

    def base(self, dtype: torch.dtype) -> Tensor:
        """The frozen weight in a dtype, rounded to it once."""
        return _dequantize(self.words, self.scale, self.in_features, dtype)

    def forward(self, input: Tensor) -> Tensor:
        """Shapes as `nn.Linear`: `[..., I] -> [..., O]`."""
        dtype = compute_dtype(input, self.adapter.A)
        x = input.to(dtype)
        result = _Frozen.apply(x, self.words, self.scale, dtype)
        if self.bias is not None:
            result = result + self.bias.to(dtype)
        dropped = F.dropout(x, self.dropout, self.training)
        thin = F.linear(dropped, self.adapter.A.to(dtype))
        return result + F.linear(thin, self.adapter.B.to(dtype)) * self.adapter.scaling

    def merged(self) -> Tensor:
        """`W_fp32 + s B A`, `[O, I]`, not rounded yet."""
        return self.adapter.merged(self.base(torch.float32))

    def extra_repr(self) -> str:
        """One line for `print(model)`."""
        return f"{self.in_features} -> {self.out_features}, nf4, dropout={self.dropout:g}"


@torch.library.custom_op("qat::dequantize_nf4", mutates_args=())
def _dequantize(words: Tensor, scale: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    return dequantize(unpack(words, NF4.bits, columns), scale, None, dtype, NF4)


@_dequantize.register_fake
def _(words, scale, columns, dtype):
    return words.new_empty(words.shape[0], columns, dtype=dtype)


class _Frozen(torch.autograd.Function):
    """`x W^T` of a weight that exists only while it is multiplied."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, words: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(words, scale)
        ctx.columns = x.shape[-1]
        return F.linear(x, _dequantize(words, scale, ctx.columns, dtype))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0] @ _dequantize(*ctx.saved_tensors, ctx.columns, grads[0].dtype), None, None, None
