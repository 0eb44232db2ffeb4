"""Levels: the nearest one on a grid, and the codes that name them. Pure functions, elementwise, on any device.

A level is a value in units of the scale: `q - z` of an integer code q with zero point z, the value of a float's bit
pattern, an entry of a codebook. `snap` is the one definition of rounding in the project.
"""

from functools import lru_cache

import torch
from torch import Tensor

from qat.numerics.grid import Codebook, Grid, IntGrid


def code_dtype(grid: Grid) -> torch.dtype:
    """int8 for integer codes; uint8 for bit patterns and indices."""
    return torch.int8 if isinstance(grid, IntGrid) else torch.uint8


def snap(u: Tensor, grid: Grid, zero_point: Tensor | None = None) -> Tensor:
    """The level nearest to `u`, saturating: a new tensor of u's shape and dtype.

    Integers: `clamp(rint(u) + z, qmin, qmax) - z`, half to even. Floats: clamped first, half to the even bit pattern.
    Codebooks: half upwards.
    """
    if isinstance(grid, IntGrid):
        if zero_point is None:
            return torch.round(u).clamp_(grid.qmin, grid.qmax).add_(0.0)  # -0 becomes +0, as an integer code has it
        return torch.round(u).add_(zero_point).clamp_(grid.qmin, grid.qmax).sub_(zero_point)
    if isinstance(grid, Codebook):
        levels, middles = _tables(grid, u.device, u.dtype)
        return levels[torch.bucketize(u, middles, right=True)]
    clamped = u.clamp(grid.low, grid.high)
    if grid.name == "e4m3":
        return clamped.to(torch.float8_e4m3fn).to(u.dtype)
    size = clamped.abs()
    step = torch.full_like(size, 0.5).masked_fill_(size >= 2, 1.0).masked_fill_(size >= 4, 2.0)  # nothing is copied
    return torch.copysign(torch.round(size / step) * step, clamped)


def encode(levels: Tensor, grid: Grid, zero_point: Tensor | None = None) -> Tensor:
    """Codes of levels that `snap` returned."""
    if isinstance(grid, IntGrid):
        return (levels if zero_point is None else levels + zero_point).to(torch.int8)
    if isinstance(grid, Codebook):
        table, _ = _tables(grid, levels.device, levels.dtype)
        return torch.bucketize(levels, table).to(torch.uint8)
    if grid.name == "e4m3":
        return levels.to(torch.float8_e4m3fn).view(torch.uint8)
    size = levels.abs()
    index = torch.where(size < 2, size * 2, torch.where(size < 4, size + 2, size / 2 + 4))
    return index.to(torch.uint8) + torch.signbit(levels).to(torch.uint8) * 8


def decode(codes: Tensor, grid: Grid, zero_point: Tensor | None = None) -> Tensor:
    """Levels of codes, fp32."""
    if isinstance(grid, IntGrid):
        return codes.float() if zero_point is None else codes.float() - zero_point
    if isinstance(grid, Codebook):
        return _tables(grid, codes.device, torch.float32)[0][codes.int()]
    if grid.name == "e4m3":
        return codes.view(torch.float8_e4m3fn).float()
    sizes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], device=codes.device)
    table = torch.cat([sizes, -sizes])  # of all 16 codes, in one look-up: a CPU takes a twelfth of the time
    return table.index_select(0, codes.int().flatten()).reshape(codes.shape)


@lru_cache(maxsize=32)
def _tables(grid: Codebook, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Levels (fp32 values), and the middles between neighbours."""
    levels = torch.tensor(grid.levels, dtype=torch.float32, device=device).to(dtype)
    return levels, (levels[1:] + levels[:-1]) / 2
