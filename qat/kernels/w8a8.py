"""Integer linear on 8-bit activations: W8A8, and W4A8 whose weights have groups. The reference.

    codes_TI int8 [T, I], scale_T fp32 [T]  from  x [..., I]                                (dynamic, one scale a token)
    y[t, o] = s[t] * sum over groups g of s_w[o, g] * sum over i in g of q[t, i] (q_w[o, i] - z_w[o, g])   -> [..., O]

The inner sums are exact integers, |sum| < 2**31 for I < 2**17; what is left to round are one product and one sum a
group, in fp32, and the product with the token's scale.
"""

import torch
from torch import Tensor

from qat.numerics.affine import group
from qat.numerics.qtensor import QuantizedTensor


def quantize_tokens(x: Tensor, reach: float = 127.5) -> tuple[Tensor, Tensor]:
    """Codes `[T, I]` and scales `[T]` of activations, `s = max|x| / reach` a token (127.5: `ct`, 127: `vllm`)."""
    rows = x.reshape(-1, x.shape[-1]).float()
    largest = rows.abs().amax(-1)
    scale = torch.where(largest > 0, (largest / reach).clamp(min=2.0**-149), torch.ones_like(largest))
    return torch.round(rows / scale[:, None]).clamp(-128, 127).to(torch.int8), scale


def linear(x: Tensor, weight: QuantizedTensor, bias: Tensor | None = None, reach: float = 127.5) -> Tensor:
    """x `[..., I]` -> fp32 `[..., O]`, activations quantized by the token."""
    assert weight.g_idx is None, "its groups are not of consecutive in-features; see QuantizedTensor.in_order"
    codes, scale = quantize_tokens(x, reach)
    grouped = group(weight.codes, weight.scale)  # [O, G, I / G], or [1, O I] of a per-tensor scale
    if weight.zero_point is not None:
        grouped = grouped.int() - weight.zero_point.int().unsqueeze(-1)
    per_tensor = weight.scale.dim() == 1
    parts = grouped.reshape(weight.shape[0], 1 if per_tensor else grouped.shape[1], -1).int()
    sums = torch.stack(
        [q.int() @ w.T for q, w in zip(codes.split(parts.shape[-1], 1), parts.unbind(1), strict=True)], -1
    )
    y = (sums * weight.served.expand(weight.shape[0], sums.shape[-1])).sum(-1) * scale[:, None]
    y = y.reshape(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias.float()
