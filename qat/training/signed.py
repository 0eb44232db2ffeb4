"""AutoRound's optimizer (Cheng et al., arXiv:2309.05516, section 3): signed gradient descent, linear decay.

    W~ = s clip(rint(W / s + V), low, high)      V <- V - lr sign(dL/dV)      log s <- log s - lr sign(dL/dlog s)

Every step moves a rounding offset V by the learning rate, in units of the quantization step s, and a scale by that
fraction of itself: so with a rate of one over the number of steps an offset gets about as far as it may, half a step.

Deviations: offsets live in the weights (`blockwise`, `round`); the logarithm of the scale is learned in place of the
factors of smallest and largest element; what is kept is the last state and not the best batch's.
"""

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from qat.numerics.affine import group
from qat.surgery.prepare import fake_quants


class SignedSGD(Optimizer):
    """`p -= lr unit sign(gradient)`.

    Args:
        student: A prepared model; what requires a gradient trains.
        lr: Of weights in units of their quantization step, and of everything else.
        scale_lr: Of scales, as a fraction, and of zero points.
    """

    def __init__(self, student: nn.Module, lr: float, scale_lr: float):
        self._linears = {linear.weight: linear for linear in fake_quants(student).values()}
        inside = {id(p) for linear in fake_quants(student).values() for p in linear.weight_fake_quant.parameters()}
        trainable = [p for p in student.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in trainable if id(p) not in inside], "lr": lr},
            {"params": [p for p in trainable if id(p) in inside], "lr": scale_lr},
        ]
        super().__init__([group for group in groups if group["params"]], {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step."""
        assert closure is None
        units = {weight: self._unit(weight) for weight in self._linears}  # before scales move
        for entry in self.param_groups:
            for parameter in entry["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad.sign() * units.get(parameter, 1.0), alpha=entry["lr"])

    def _unit(self, weight: Tensor) -> Tensor:
        """The quantization step of each element."""
        scale, _ = self._linears[weight].weight_fake_quant.qparams()
        return scale.float().abs().unsqueeze(-1).expand(group(weight, scale).shape).reshape(weight.shape)


def signed(student: nn.Module, steps: int, lr: float | None, scale_lr: float | None) -> tuple[Optimizer, LambdaLR]:
    """Optimizer and linear decay to zero; rates that are None are one over the number of steps."""
    optimizer = SignedSGD(student, *(1 / steps if rate is None else rate for rate in (lr, scale_lr)))
    return optimizer, LambdaLR(optimizer, lambda step: 1 - step / steps)
