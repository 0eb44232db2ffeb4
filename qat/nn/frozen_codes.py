"""Frozen codes: only the scales of a prepared model train, as in EfficientQAT's second stage (E2E-QP).

arXiv:2407.11062, section 3.3: the integers are settled, W^ = (q - z) s, so dW^ / ds = q - z for every element, inside
the grid and at its edges alike, whatever estimator found the codes. Masters stand at the centres of their cells, and
follow when the scale moves: what quantizes, exports and certifies them needs to know nothing of this.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from qat.nn.embedding import QATEmbedding
from qat.nn.estimators import Gradients, Rounded
from qat.nn.fake_quantize import FakeQuantize, Phase
from qat.nn.linear import QATLinear
from qat.numerics.affine import dequantize
from qat.numerics.scheme import E8M0


@dataclass(frozen=True)
class FrozenCodes:
    """dx = 0, ds = G Q(u), q - z on integer grids: the exact derivative, since the codes do not depend on s."""

    learns_scale: ClassVar[bool] = True
    learns_zero: ClassVar[bool] = False

    def gradients(self, grad: Tensor, rounded: Rounded) -> Gradients:
        """Gradients for x and s."""
        return torch.zeros_like(grad), rounded.level * grad, None


@torch.no_grad()
def freeze_codes(model: nn.Module) -> None:
    """Settles the codes of a prepared model, in place: from here on, nothing but the scales of weights trains.

    Raises:
        ValueError: A scale is a power of two, and cannot be learned, or a linear has an adapter; names the module.
    """
    model.requires_grad_(False)
    for linear in _quantized(model):
        quant = linear.weight_fake_quant
        if isinstance(linear, QATLinear) and linear.adapter is not None:
            raise ValueError(f"{quant.name}: an adapter trains A and B, but optim.train=scales leaves codes; use all")
        if quant.scheme.scale_dtype == E8M0:
            raise ValueError(f"{quant.name}: scales of {quant.scheme} are powers of two; use optim.train=all")
        linear.weight.copy_(_values(quant, quant.codes(linear.weight)))
        quant.estimator, quant.phase = FrozenCodes(), Phase.LEARN
        quant.log_step.requires_grad_(True)


class Follow:
    """Called after every optimizer step, brings the masters back to the centres of their cells: no code ever moves."""

    @torch.no_grad()
    def __init__(self, model: nn.Module):
        self._codes = [(linear, linear.weight_fake_quant.codes(linear.weight)) for linear in _quantized(model)]

    @torch.no_grad()
    def __call__(self, *_: object) -> None:
        """Takes the arguments of a hook of an optimizer."""
        for linear, codes in self._codes:
            linear.weight.copy_(_values(linear.weight_fake_quant, codes))


def _values(quant: FakeQuantize, codes: Tensor) -> Tensor:
    return dequantize(codes, *quant.qparams(), torch.float32, quant.scheme.grid, quant.global_scale)


def _quantized(model: nn.Module) -> list[QATLinear | QATEmbedding]:
    """One module for each set of codes: of a tied pair, whichever comes first."""
    modules = [module for module in model.modules() if isinstance(module, QATLinear | QATEmbedding)]
    return list({module.weight_fake_quant: module for module in reversed(modules)}.values())
