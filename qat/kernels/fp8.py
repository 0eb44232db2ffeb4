"""FP8 linear, weights and activations in e4m3. The reference, rounded by arithmetic rather than by a cast.

x [..., I] -> levels of e4m3 [T, I] and scale fp32 [T] or [1];   y = s_x (levels_x levels_w^T) s_w  -> fp32 [..., O]
"""

import torch
from torch import Tensor

from qat.numerics.qtensor import QuantizedTensor

LARGEST = 448.0


def round_e4m3(x: Tensor) -> Tensor:
    """The nearest value of e4m3 (3 mantissa bits, least exponent -6), ties to the even mantissa, saturating at 448."""
    clamped = x.float().clamp(-LARGEST, LARGEST)
    _, exponent = torch.frexp(clamped)  # |x| = m 2**exponent, m in [0.5, 1): the leading bit is 2**(exponent - 1)
    step = torch.ldexp(torch.ones_like(clamped), (exponent - 1).clamp(min=-6) - 3)
    return torch.copysign(torch.round(clamped / step) * step, clamped)


def quantize_tokens(x: Tensor, scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Levels `[T, I]` and scales `[T]`: `max|x| / 448` a token, or the static `scale` `[1]`."""
    rows = x.reshape(-1, x.shape[-1]).float()
    if scale is None:
        largest = rows.abs().amax(-1)
        scale = torch.where(largest > 0, (largest / LARGEST).clamp(min=2.0**-149), torch.ones_like(largest))
    return round_e4m3(rows / scale.float()[:, None]), scale.float()


def linear(x: Tensor, weight: QuantizedTensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    """x `[..., I]` -> fp32 `[..., O]`; weight scales per output channel or per tensor."""
    levels, scale = quantize_tokens(x, scale)
    y = (levels @ weight.codes.view(torch.float8_e4m3fn).float().T) * weight.scale.float().reshape(1, -1)
    y = (y * scale[:, None]).reshape(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias.float()
