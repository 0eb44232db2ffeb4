"""Frozen codes: only the scales of a prepared model train, as in EfficientQAT's second stage (E2E-QP).

arXiv:2407.11062, section 3.3: the integers are settled, W^ = (q - z) s, so dW^ / ds = q - z for every element, inside
the grid and at its edges alike, whatever estimator found the codes. Masters stand at the centres of their cells, and
follow when the scale moves: what quantizes, exports and certifies them needs to know nothing of this.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from qat.nn.fake_quantize import Phase
from qat.nn.linear import QATLinear
from qat.numerics.affine import dequantize


@dataclass(frozen=True)
class FrozenCodes:
    """dx = 0, ds = G (q - z): the exact derivative of the result, since the codes do not depend on s."""

    learns_scale: ClassVar[bool] = True

    def gradients(
        self, grad: Tensor, v: Tensor, qmin: int, qmax: int, zero_point: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Gradients for x and s."""
        level = torch.round(v).clamp_(qmin, qmax)
        if zero_point is not None:
            level.sub_(zero_point)
        return torch.zeros_like(grad), level.mul_(grad)


@torch.no_grad()
def freeze_codes(model: nn.Module) -> None:
    """Settles the codes of a prepared model, in place: from here on, nothing but the scales of weights trains."""
    model.requires_grad_(False)
    for linear in _linears(model):
        quant = linear.weight_fake_quant
        linear.weight.copy_(dequantize(quant.codes(linear.weight), *quant.qparams(), torch.float32))
        quant.estimator, quant.phase = FrozenCodes(), Phase.LEARN
        quant.log_step.requires_grad_(True)


class Follow:
    """Called after every optimizer step, brings the masters back to the centres of their cells: no code ever moves."""

    @torch.no_grad()
    def __init__(self, model: nn.Module):
        self._codes = [(linear, linear.weight_fake_quant.codes(linear.weight)) for linear in _linears(model)]

    @torch.no_grad()
    def __call__(self, *_: object) -> None:
        """Takes the arguments of a hook of an optimizer."""
        for linear, codes in self._codes:
            linear.weight.copy_(dequantize(codes, *linear.weight_fake_quant.qparams(), torch.float32))


def _linears(model: nn.Module) -> list[QATLinear]:
    return [module for module in model.modules() if isinstance(module, QATLinear)]
