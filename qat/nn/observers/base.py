"""What an observer promises."""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from qat.numerics.affine import qparams
from qat.numerics.scheme import Scheme

Range = tuple[Tensor, Tensor]


class Observer(ABC):
    """Finds the range that a tensor's scales are computed from. It keeps no state: what it says, the tensor said.

    `averages` says how ranges of several tensors (batches of activations, ranks) become one: the mean, or the union.
    """

    averages: ClassVar[bool] = False

    @abstractmethod
    def observe(self, x: Tensor, scheme: Scheme, dtype: torch.dtype, g: Tensor | None = None) -> Range:
        """Range of every group of `x`: two fp32 tensors of the scale's shape.

        Args:
            x: The tensor, `[O, I]` for a weight.
            scheme: How it will be quantized.
            dtype: Storage dtype, since what matters is the rounded scale.
            g: Divisor of a two-level scheme.
        """

    def merge(self, old: Range, new: Range, seen: int) -> Range:
        """One range for what `seen` tensors said together (`old`) and what one more says."""
        if self.averages:
            return old[0] + (new[0] - old[0]) / (seen + 1), old[1] + (new[1] - old[1]) / (seen + 1)
        return torch.minimum(old[0], new[0]), torch.maximum(old[1], new[1])

    def qparams(
        self, x: Tensor, scheme: Scheme, dtype: torch.dtype, g: Tensor | None = None, check: bool = True
    ) -> tuple[Tensor, Tensor | None]:
        """Scale (in its stored dtype) and zero point of `x`; see `numerics.affine.qparams`."""
        return qparams(*self.observe(x, scheme, dtype, g), scheme, dtype, g, check)


def across_ranks(low: Tensor, high: Tensor, averages: bool) -> Range:
    """The range of all ranks; this rank's where there is one."""
    if not (dist.is_available() and dist.is_initialized()):
        return low, high
    if averages:
        both = torch.stack([low, high]) / dist.get_world_size()
        dist.all_reduce(both)
        return both[0], both[1]
    both = torch.stack([-low, high])
    dist.all_reduce(both, dist.ReduceOp.MAX)
    return -both[0], both[1]
