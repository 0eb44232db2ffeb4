"""Block-scaled linears: NVFP4, MXFP4 and MXFP8, weights alone or activations too. The reference.

    NVFP4  groups of 16, e2m1 levels, scale e4m3(min(448, g max|x| / 6)) over the tensor's divisor g = 448 * 6 / max|X|
    MX     groups of 32, e2m1 or e4m3 levels, scale 2**e with e = floor(log2(max|x|)) - (2 or 8), one more where
           max|x| >= 1.75 * 2**floor(log2(max|x|)): compressed-tensors' rule
    y = levels_x s_x (levels_w s_w)^T, products in fp32: x [..., I] -> [..., O]

Rounding to e2m1 is by its thresholds, to e4m3 by arithmetic (`fp8.py`): neither shares code with training's.
"""

import torch
from torch import Tensor

from qat.kernels.fp8 import round_e4m3
from qat.numerics.qtensor import QuantizedTensor

SIZES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# Between neighbours, and which of them a tie goes to: the one with the even bit pattern, by < or <=.
THRESHOLDS = ((0.25, False), (0.75, True), (1.25, False), (1.75, True), (2.5, False), (3.5, True), (5.0, False))


def round_e2m1(x: Tensor) -> Tensor:
    """The nearest value of e2m1, ties to the even bit pattern, saturating at 6."""
    size = x.float().abs()
    index = sum((size >= t if up else size > t).int() for t, up in THRESHOLDS)
    assert isinstance(index, Tensor)
    return torch.copysign(torch.tensor(SIZES, device=x.device)[index], x.float())


def nvfp4(x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Levels `[..., I]` and served scales fp32 `[..., I / 16]` of a tensor with divisor g `[1]`."""
    blocks = x.float().unflatten(-1, (-1, 16))
    largest = blocks.abs().amax(-1)
    stored = round_e4m3((g * largest / 6).clamp(2.0**-9, 448.0))
    scale = torch.where(largest > 0, stored, torch.ones_like(stored)) / g
    return round_e2m1(blocks / scale.unsqueeze(-1)).flatten(-2), scale


def mx(x: Tensor, exponent: int) -> tuple[Tensor, Tensor]:
    """Levels `[..., I]` and scales fp32 `[..., I / 32]`; `exponent`: the largest level's, 2 (e2m1) or 8 (e4m3)."""
    blocks = x.float().unflatten(-1, (-1, 32))
    largest = blocks.abs().amax(-1)
    mantissa, power = torch.frexp(largest)  # in [0.5, 1): 1.75 is 0.875
    scale = torch.ldexp(torch.ones_like(largest), (power - 1 + (mantissa >= 0.875).int() - exponent).clamp(min=-126))
    scale = torch.where(largest > 0, scale, torch.ones_like(scale))
    to_level = round_e2m1 if exponent == 2 else round_e4m3
    return to_level(blocks / scale.unsqueeze(-1)).flatten(-2), scale


def linear(
    x: Tensor, weight: QuantizedTensor, bias: Tensor | None = None, input: tuple[Tensor, Tensor] | None = None
) -> Tensor:
    """x `[..., I]` -> fp32 `[..., O]`; `input`: x's levels and scales, where activations are quantized too."""
    if input is not None:
        levels, scale = input
        x = (levels.unflatten(-1, (scale.shape[-1], -1)) * scale.unsqueeze(-1)).flatten(-2)
    y = x.float() @ weight.dequantize(torch.float32).T
    return y if bias is None else y + bias.float()
