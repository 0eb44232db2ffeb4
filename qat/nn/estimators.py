"""Estimators: the gradient of rounding.

With v = x / s + z (unrounded, in code units), q = clamp(rint(v), qmin, qmax) and the result (q - z) * s, an estimator
says what the result's gradient G means for x and, where it learns the scale, for s. Each is a value with

    gradients(G, v, qmin, qmax, zero_point) -> (dx, ds or None)      elementwise, fp32, all of v's shape

`v` is the estimator's to overwrite, and a zero point of None is 0. The caller sums `ds` over the elements that share a
scale. Three masks are in use in the field, and they differ on codes that round into the grid from outside it; each
estimator names its own.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor


class Estimator(Protocol):
    """What `FakeQuantize` asks of an estimator."""

    learns_scale: ClassVar[bool]

    def gradients(
        self, grad: Tensor, v: Tensor, qmin: int, qmax: int, zero_point: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients for x and, elementwise, for s."""
        ...


@dataclass(frozen=True)
class StraightThrough:
    """dx = G everywhere, also where the code is clamped (arXiv:1308.3432). The scale is not learned."""

    learns_scale: ClassVar[bool] = False

    def gradients(
        self, grad: Tensor, v: Tensor, qmin: int, qmax: int, zero_point: Tensor | None
    ) -> tuple[Tensor, None]:
        """Gradient for x."""
        return grad, None


@dataclass(frozen=True)
class Clipped:
    """dx = G where the ROUNDED code lies in the grid, `qmin <= rint(v) <= qmax`, else 0. The scale is not learned."""

    learns_scale: ClassVar[bool] = False

    def gradients(
        self, grad: Tensor, v: Tensor, qmin: int, qmax: int, zero_point: Tensor | None
    ) -> tuple[Tensor, None]:
        """Gradient for x."""
        code = torch.round(v)
        return grad * ((code >= qmin) & (code <= qmax)), None


@dataclass(frozen=True)
class LSQ:
    """Learned step size quantization, arXiv:1902.08153, equations 3 and 5; the mask is on the UNROUNDED v.

        dx = G [qmin < v < qmax]                                                         (eq. 5)
        ds = G g (rint(v) - v  if qmin < v < qmax;  qmin - z  if v <= qmin;  qmax - z  if v >= qmax)    (eq. 3)

    with g = 1 / sqrt(N qmax), N the elements that share the scale (section 2.2), if `scale_gradient`. Deviation: the
    caller learns log s, so ds is multiplied by s there and no scale can cross 0.
    """

    scale_gradient: bool = True
    learns_scale: ClassVar[bool] = True

    def gradients(
        self, grad: Tensor, v: Tensor, qmin: int, qmax: int, zero_point: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Gradients for x and s."""
        inside = (v > qmin).logical_and_(v < qmax)
        error = torch.round(v).sub_(v)
        edge = v.clamp_(qmin, qmax)
        if zero_point is not None:
            edge.sub_(zero_point)
        ds = torch.where(inside, error, edge).mul_(grad)
        if self.scale_gradient:
            ds.div_(math.sqrt(v.shape[-1] * max(qmax, 1)))
        return grad * inside, ds
