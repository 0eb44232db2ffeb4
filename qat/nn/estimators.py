"""Estimators: the gradient of rounding.

With u = x / s, the level Q(u) nearest to it (`numerics/levels.py`; q - z on integer grids) and the result Q(u) s, an
estimator says what the result's gradient G means for x and, where it learns them, for the scale s and the zero point z:

    gradients(G, rounded) -> (dx, ds or None, dz or None)      elementwise, fp32, all of u's shape

The caller sums ds and dz over the elements that share a scale, and multiplies dz by s. Three masks are in use in the
field; they differ on elements that round into the grid from outside it:

    (a) none                          pass-through
    (b) the ROUNDED code is a code    |rint| within the outermost levels, both included
    (c) the UNROUNDED u lies strictly between the outermost levels

Each estimator names its own. All of them cost a few elementwise operations beside the forward's.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

Gradients = tuple[Tensor, Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Rounded:
    """What an estimator sees of one rounding; grouped, so that the last axis shares a scale.

    Attributes:
        u: x / s.
        level: Q(u).
        low: The lowest level (qmin - z), a number or a tensor that broadcasts.
        high: The highest level (qmax - z).
        outer: Half the distance between the outermost level and its neighbour.
        integer: Whether levels are the integers between `low` and `high`.
        top: The grid's highest level without a zero point (LSQ's Q_P).
        reach: What the largest magnitude of a symmetric group is mapped to, by the convention `ct`.
        elements: Elements that share the scale; of an activation, its features.
    """

    u: Tensor
    level: Tensor
    low: Tensor | float
    high: Tensor | float
    outer: float
    integer: bool
    top: float
    reach: float
    elements: int

    def between(self) -> Tensor:
        """Mask (c)."""
        return (self.u > self.low) & (self.u < self.high)

    def rounded_between(self) -> Tensor:
        """Mask (b); on grids without a uniform step, within half the outermost step of the outermost level."""
        if self.integer:
            code = torch.round(self.u)
            return (code >= self.low) & (code <= self.high)
        return (self.u > self.low - self.outer) & (self.u < self.high + self.outer)

    def scale_gradient(self) -> float:
        """LSQ's g = 1 / sqrt(N qmax)."""
        return 1 / math.sqrt(self.elements * self.top)


class Estimator(Protocol):
    """What `FakeQuantize` asks of an estimator."""

    learns_scale: ClassVar[bool]
    learns_zero: ClassVar[bool]

    def gradients(self, grad: Tensor, rounded: Rounded) -> Gradients:
        """Gradients for x and, elementwise, for s and z."""
        ...


@dataclass(frozen=True)
class StraightThrough:
    """dx = G everywhere, also where the code is clamped (arXiv:1308.3432); mask (a). Nothing else is learned."""

    learns_scale: ClassVar[bool] = False
    learns_zero: ClassVar[bool] = False

    def gradients(self, grad: Tensor, rounded: Rounded) -> Gradients:
        """Gradient for x."""
        return grad, None, None


@dataclass(frozen=True)
class Clipped:
    """dx = G where the rounded code lies in the grid, else 0; mask (b). Nothing else is learned."""

    learns_scale: ClassVar[bool] = False
    learns_zero: ClassVar[bool] = False

    def gradients(self, grad: Tensor, rounded: Rounded) -> Gradients:
        """Gradient for x."""
        return grad * rounded.rounded_between(), None, None


@dataclass(frozen=True)
class LSQ:
    """Learned step size quantization, arXiv:1902.08153, equations 3 and 5; mask (c).

        dx = G [low < u < high]                                                    (eq. 5)
        ds = G g (Q(u) - u  where low < u < high;  low  where u <= low;  high  where u >= high)    (eq. 3)

    with g = 1 / sqrt(N qmax), N the elements that share the scale (section 2.2), if `scale_gradient`. On grids that are
    not integers Q(u) is the nearest level. Deviation: the caller learns log s, so ds is multiplied by s there and no
    scale can cross 0.
    """

    scale_gradient: bool = True
    learns_scale: ClassVar[bool] = True
    learns_zero: ClassVar[bool] = False

    def gradients(self, grad: Tensor, rounded: Rounded) -> Gradients:
        """Gradients for x and s."""
        inside = rounded.between()
        ds = torch.where(inside, rounded.level - rounded.u, rounded.level).mul_(grad)
        if self.scale_gradient:
            ds.mul_(rounded.scale_gradient())
        return grad * inside, ds, None


@dataclass(frozen=True)
class LSQPlus:
    """LSQ+, arXiv:2004.09576, equations 3 to 6: LSQ with a learned offset, for asymmetric schemes; mask (c).

    The paper's offset is b = -z s. Deviations: z itself is learned, in units of codes, and the forward rounds it, since
    an integer is what is stored; with s held, db = G g [outside] becomes dz = -s G g [outside], and ds is that of LSQ
    with q - z in place of q. log s is learned in place of s.
    """

    scale_gradient: bool = True
    learns_scale: ClassVar[bool] = True
    learns_zero: ClassVar[bool] = True

    def gradients(self, grad: Tensor, rounded: Rounded) -> Gradients:
        """Gradients for x, s and z."""
        inside = rounded.between()
        g = rounded.scale_gradient() if self.scale_gradient else 1.0
        ds = torch.where(inside, rounded.level - rounded.u, rounded.level).mul_(grad).mul_(g)
        return grad * inside, ds, (grad * ~inside).mul_(-g)


@dataclass(frozen=True)
class EfficientQAT:
    """What EfficientQAT's Block-AP trains, arXiv:2407.11062, equations 1 and 2 by autograd: s, z and W; mask (b).

        dx = G [rounded inside],  ds = G (Q(u) - u inside; level outside),  dz = -s G [rounded outside]

    No gradient scale. Deviation: log s is learned in place of s. On a symmetric scheme there is no z to learn.
    """

    learns_scale: ClassVar[bool] = True
    learns_zero: ClassVar[bool] = True

    def gradients(self, grad: Tensor, rounded: Rounded) -> Gradients:
        """Gradients for x, s and z."""
        inside = rounded.rounded_between()
        ds = torch.where(inside, rounded.level - rounded.u, rounded.level).mul_(grad)
        return grad * inside, ds, (grad * ~inside).neg_()


@dataclass(frozen=True)
class PACT:
    """PACT, arXiv:1805.06085, equation 3, for activations: a learned clipping level a = high s; mask (c).

        dx = G [low < u < high]
        da = G [u >= high] (and -G [u <= low] on symmetric grids), hence ds = G level outside, else 0

    The rounding term of LSQ is dropped, as in the paper. Deviation: log s is learned, and so log a.
    """

    learns_scale: ClassVar[bool] = True
    learns_zero: ClassVar[bool] = False

    def gradients(self, grad: Tensor, rounded: Rounded) -> Gradients:
        """Gradients for x and s."""
        inside = rounded.between()
        return grad * inside, (rounded.level * grad).mul_(~inside), None


@dataclass(frozen=True)
class SEQ:
    """Stretched elastic quantization of ParetoQ, arXiv:2502.02631, equations 3 to 6, for its codebooks.

        dx = G [|u| <= 0.99 reach],  ds = G (Q(u) - u inside; the saturated level outside)

    with a = reach s the paper's scale. On `binary` the paper has dx = G [|x| <= a] and da = sign(x) G. Deviations:
    log s is learned; the outside gradient on ternary is that of the saturated level, 2/3 of a, where the published code
    has 1 (`published=true` brings that back).
    """

    published: bool = False
    learns_scale: ClassVar[bool] = True
    learns_zero: ClassVar[bool] = False

    def gradients(self, grad: Tensor, rounded: Rounded) -> Gradients:
        """Gradients for x and s."""
        stretched = rounded.reach > 1
        inside = rounded.u.abs() <= (0.99 if stretched else 1.0) * rounded.reach
        outside = rounded.level
        if self.published and rounded.reach == 1.5:
            outside = rounded.level * rounded.reach
        error = rounded.level - rounded.u if stretched else rounded.level
        return grad * inside, torch.where(inside, error, outside).mul_(grad), None
