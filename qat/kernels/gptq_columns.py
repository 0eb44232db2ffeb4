"""GPTQ's inner loop: the columns of one block, one after another, as one launch where the device can.

A column takes about ten operations on a vector of rows, far too few for a GPU to notice: it waits for the host, which
issues a million of them for a small model. So on a GPU the loop is recorded once for each shape as a CUDA graph, and
replayed. It consists of the same kernels on the same numbers in the same order, so codes are the same bits.
"""

from functools import lru_cache

import torch
from torch import Tensor

from qat.numerics.grid import Grid
from qat.numerics.levels import code_dtype, encode, snap

SHAPES = 16  # graphs that are kept; a family has a handful of shapes


def round_block(
    rest_OB: Tensor, scale_OB: Tensor, zero_OB: Tensor | None, factor_BB: Tensor, grid: Grid
) -> tuple[Tensor, Tensor]:
    """Rounds a block of columns from left to right; each one's error is made up for by those after it.

    Args:
        rest_OB: What is left of the weight; changed on the way, and of no use afterwards.
        scale_OB: The scale of each element, as served.
        zero_OB: Its zero point, on asymmetric schemes.
        factor_BB: The block on the diagonal of the upper Cholesky factor of the inverse Hessian.
        grid: Of the codes.

    Returns:
        Codes and errors (in units of the factor's diagonal), `[O, B]` each; on a GPU, until the next call.
    """
    if rest_OB.device.type != "cuda":
        codes, errors = torch.empty_like(rest_OB, dtype=code_dtype(grid)), torch.empty_like(rest_OB)
        _columns(rest_OB, scale_OB, zero_OB, factor_BB, grid, codes, errors)
        return codes, errors
    recorded = _recorded(*rest_OB.shape, grid, zero_OB is not None, rest_OB.device)
    return recorded.replay(rest_OB, scale_OB, zero_OB, factor_BB)


def forget() -> None:
    """Gives back the memory of all recorded loops."""
    _recorded.cache_clear()


def _columns(
    rest: Tensor, scale: Tensor, zero: Tensor | None, factor: Tensor, grid: Grid, codes: Tensor, errors: Tensor
) -> None:
    for i in range(rest.shape[1]):
        s, z = scale[:, i], None if zero is None else zero[:, i]
        w = rest[:, i]
        level = snap(w / s, grid, z)
        error = (w - level * s) / factor[i, i]
        rest[:, i + 1 :].addr_(error, factor[i, i + 1 :], alpha=-1.0)
        codes[:, i], errors[:, i] = encode(level, grid, z), error


class Recorded:
    """The loop over blocks of one shape on a GPU, in memory of its own.

    Args:
        rows: Rows of a block.
        columns: Its columns.
        grid: Of the codes.
        asymmetric: Whether there are zero points.
        device: The GPU.
    """

    def __init__(self, rows: int, columns: int, grid: Grid, asymmetric: bool, device: torch.device):
        block = torch.ones(3, rows, columns, device=device)  # ones: the rehearsal divides by scales
        self._rest, self._scale, zero = block
        self._zero = zero if asymmetric else None
        self._factor = torch.ones(columns, columns, device=device)
        self._codes = torch.empty(rows, columns, dtype=code_dtype(grid), device=device)
        self._errors = torch.empty(rows, columns, device=device)
        arguments = self._rest, self._scale, self._zero, self._factor, grid, self._codes, self._errors
        self._graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.device(device):
            with torch.cuda.stream(stream):
                _columns(*arguments)  # a rehearsal: kernels are loaded, and a codebook's tables are put on the device
            with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):  # others may go on
                _columns(*arguments)
        torch.cuda.current_stream(device).wait_stream(stream)

    def replay(self, rest: Tensor, scale: Tensor, zero: Tensor | None, factor: Tensor) -> tuple[Tensor, Tensor]:
        """See `round_block`."""
        self._rest.copy_(rest)
        self._scale.copy_(scale)
        if self._zero is not None and zero is not None:
            self._zero.copy_(zero)
        self._factor.copy_(factor)
        self._graph.replay()
        return self._codes, self._errors


_recorded = lru_cache(maxsize=SHAPES)(Recorded)
