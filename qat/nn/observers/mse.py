"""The range whose rounding error is smallest."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qat.kernels.fake_quant import fake_quantize
from qat.nn.observers.base import Observer, Range
from qat.numerics.affine import qparams, ranges, shrunken
from qat.numerics.scheme import Scheme


@dataclass(frozen=True)
class MSE(Observer):
    """Shrinks the min-max range of every group by the factor, among `points`, that rounds it best.

    Factors run evenly from 1 down to `smallest`, both included, and the error of a group is sum |Q(x) - x|**norm with
    the scale already rounded to its stored dtype; by the signed convention each is tried with either sign. GPTQ's own
    search (`mse=True`) has 80 points, 0.2 and norm 2.4. A range is searched on the whole tensor at once and held to
    rows of at most `ROWS`, so that memory stays flat. Ranges of several batches of activations are averaged.

    Raises:
        ValueError: `points` below 1, or `smallest` or `norm` out of their range.
    """

    points: int = 80
    smallest: float = 0.2
    norm: float = 2.0

    ROWS = 4096
    averages = True

    def __post_init__(self) -> None:
        if self.points < 1:
            raise ValueError(f"points={self.points}: at least one candidate (the min-max range itself)")
        if not 0 < self.smallest <= 1:
            raise ValueError(f"smallest={self.smallest}: a factor in (0, 1]")
        if not self.norm > 0:
            raise ValueError(f"norm={self.norm}: a positive exponent")

    def observe(self, x: Tensor, scheme: Scheme, dtype: torch.dtype, g: Tensor | None = None) -> Range:
        """Range of every group of `x`."""
        shape = scheme.granularity.scale_shape(tuple(x.shape))
        if x.dim() == 2 and shape[0] == x.shape[0] > self.ROWS:  # rows are independent of each other
            parts = [self._search(rows, scheme, dtype, g) for rows in x.split(self.ROWS)]
            return torch.cat([lo for lo, _ in parts]), torch.cat([hi for _, hi in parts])
        return self._search(x, scheme, dtype, g)

    def _search(self, x: Tensor, scheme: Scheme, dtype: torch.dtype, g: Tensor | None) -> Range:
        lo, hi = ranges(x, scheme)
        factors = [1 - (1 - self.smallest) * i / max(self.points - 1, 1) for i in range(self.points)]
        lows, highs = (torch.stack(ends) for ends in zip(*shrunken(lo, hi, factors, scheme), strict=True))
        scales, zeros = qparams(lows, highs, scheme, dtype, g)  # of all candidates at once: a GPU's host waits in it
        best_lo, best_hi, best = lo, hi, torch.full_like(lo, torch.inf)
        for i, (low, high, scale) in enumerate(zip(lows, highs, scales, strict=True)):
            zero_point = None if zeros is None else zeros[i]
            rounded, _ = fake_quantize(x, scale, scheme.grid, torch.float32, zero_point=zero_point, global_scale=g)
            difference = rounded.sub_(x).reshape(*scale.shape, -1)
            error = (difference.square_() if self.norm == 2 else difference.abs_().pow_(self.norm)).sum(-1)
            better = error < best
            best = torch.where(better, error, best)
            best_lo, best_hi = torch.where(better, low, best_lo), torch.where(better, high, best_hi)
        return best_lo, best_hi
