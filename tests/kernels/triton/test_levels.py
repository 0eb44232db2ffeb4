"""Levels in Triton are those of `numerics/levels.py`, bit for bit, in the interpreter too."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from qat.kernels.triton.levels import kind
from qat.kernels.triton.levels import snap as snap_triton
from qat.numerics.grid import FloatGrid, IntGrid
from qat.numerics.levels import snap

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GRIDS = [*map(IntGrid, range(2, 9)), FloatGrid("e2m1"), FloatGrid("e4m3")]
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")


@triton.jit
def _snap(u, z, out, n, low, high, B: tl.constexpr, GRID: tl.constexpr, ZERO: tl.constexpr):
    at = tl.program_id(0) * B + tl.arange(0, B)
    mask = at < n
    found = snap_triton(tl.load(u + at, mask=mask), tl.load(z + at, mask=mask).to(tl.float32), low, high, GRID, ZERO)
    tl.store(out + at, found, mask=mask)


def run(u, z, grid):
    out = torch.empty_like(u)
    zero = torch.zeros_like(u) if z is None else z
    _snap[(triton.cdiv(u.numel(), 1024),)](
        u, zero, out, u.numel(), float(grid.low), float(grid.high), 1024, kind(grid), z is not None
    )
    return out


def same(a, b):
    return bool(((a.view(torch.int32) == b.view(torch.int32)) | (a.isnan() & b.isnan())).all())


def points(grid):
    """Every tie and edge, beside each, all magnitudes, and what is no number."""
    steps = torch.arange(-1100, 1100) / 4
    beside = torch.cat([steps, steps.nextafter(torch.tensor(1e9)), steps.nextafter(torch.tensor(-1e9))])
    wide = torch.randn(4096) * torch.logspace(-44, 38, 4096)
    special = torch.tensor([0.0, -0.0, 1e-45, -1e-45, float("inf"), -float("inf"), float("nan"), 3e38, -3e38])
    return torch.cat([beside, beside / 512, grid.high + beside / 64, wide, special]).to(DEVICE)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_levels_are_the_references(grid):
    u = points(grid)
    assert same(run(u, None, grid), snap(u, grid))


@pytest.mark.parametrize("grid", GRIDS[:7], ids=str)
def test_levels_with_a_zero_point_are_the_references(grid):
    u = points(grid)
    for z in {grid.qmin, -1, 0, 1, grid.qmax}:
        zero = torch.full_like(u, z)
        assert same(run(u, zero, grid), snap(u, grid, zero)), z


@pytest.mark.gpu
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_levels_of_a_sweep_over_all_bit_patterns(grid):
    for start in range(-(1 << 31), 1 << 31, 1 << 28):  # every 61st, an odd number
        u = torch.arange(start, min(start + (1 << 28), (1 << 31) - 1), 61, dtype=torch.int32, device="cuda")
        u = u.view(torch.float32)
        assert same(run(u, None, grid), snap(u, grid))
