"""Rounding to a grid, against a search through all of its levels in exact arithmetic."""

from bisect import bisect_right
from fractions import Fraction
from itertools import pairwise

import pytest
import torch

from qat.numerics.grid import CODEBOOKS, Codebook, FloatGrid, IntGrid
from qat.numerics.levels import code_dtype, decode, encode, snap

E2M1, E4M3 = FloatGrid("e2m1"), FloatGrid("e4m3")
GRIDS = [IntGrid(2), IntGrid(4), IntGrid(8), E2M1, E4M3, *(Codebook(name) for name in CODEBOOKS)]


def value_of_bits(code, exponent_bits, mantissa_bits):
    """What a float's bit pattern means, by the definition of the format; None for NaN."""
    sign = -1 if code >> (exponent_bits + mantissa_bits) else 1
    exponent = (code >> mantissa_bits) & (2**exponent_bits - 1)
    mantissa = code & (2**mantissa_bits - 1)
    bias = 2 ** (exponent_bits - 1) - 1
    if (exponent_bits, code & 127) == (4, 127):
        return None
    if exponent == 0:
        return sign * Fraction(mantissa, 2**mantissa_bits) * Fraction(2) ** (1 - bias)
    return sign * (1 + Fraction(mantissa, 2**mantissa_bits)) * Fraction(2) ** (exponent - bias)


def all_codes(grid):
    return torch.arange(grid.qmin, grid.qmax + 1, dtype=torch.int8) if isinstance(grid, IntGrid) else (
        torch.arange(len(grid.levels), dtype=torch.uint8) if isinstance(grid, Codebook)
        else torch.tensor([c for c in range(2**grid.bits) if grid is E2M1 or c & 127 != 127], dtype=torch.uint8)
    )  # fmt: skip


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_codes_and_levels_are_one_to_one(grid):
    codes = all_codes(grid)
    levels = decode(codes, grid)
    assert encode(levels, grid).dtype == codes.dtype == code_dtype(grid)
    assert torch.equal(encode(levels, grid), codes)
    assert torch.equal(snap(levels, grid), levels)
    assert (float(levels.min()), float(levels.max())) == (grid.low, grid.high)


@pytest.mark.parametrize(("grid", "shape"), [(E2M1, (2, 1)), (E4M3, (4, 3))], ids=str)
def test_bit_patterns_mean_what_the_format_says(grid, shape):
    codes = all_codes(grid)
    expected = [float(value_of_bits(int(code), *shape)) for code in codes]
    assert decode(codes, grid).tolist() == expected


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_nearest_level_wins_and_ties_go_where_they_should(grid):
    codes = all_codes(grid)
    names: dict[Fraction, set[int]] = {}
    for level, code in zip(decode(codes, grid).tolist(), codes.tolist(), strict=True):
        names.setdefault(Fraction(level), set()).add(code)  # a float's zero has two
    values = sorted(names)
    middles = torch.tensor([float((a + b) / 2) for a, b in pairwise(values)])  # a codebook's are rounded to fp32
    near = [middles.nextafter(torch.full_like(middles, w)) for w in (-torch.inf, torch.inf)]
    u = torch.cat([middles, *near, torch.randn(100) * grid.high / 2, torch.tensor([-1e4, 1e4, 0.0])])
    for x, found in zip(u.tolist(), snap(u, grid).tolist(), strict=True):
        if isinstance(grid, Codebook):
            assert Fraction(found) == values[bisect_right(middles.tolist(), x)], x
            continue
        at = bisect_right(values, Fraction(x))
        around = values[max(at - 1, 0) : at + 1]
        distances = [abs(value - Fraction(x)) for value in around]
        nearest = [value for value, d in zip(around, distances, strict=True) if d == min(distances)]
        if len(nearest) > 1:
            nearest = [value for value in nearest if min(names[value]) % 2 == 0]
        assert [Fraction(found)] == nearest, x


def test_a_zero_point_shifts_the_range_not_the_rounding():
    u, z = torch.tensor([-9.0, -2.5, 0.5, 1.5, 20.0]), torch.tensor(3.0)
    assert snap(u, IntGrid(4), z).tolist() == [-9.0, -2.0, 0.0, 2.0, 4.0]
    assert encode(snap(u, IntGrid(4), z), IntGrid(4), z).tolist() == [-6, 1, 3, 5, 7]
    assert torch.equal(decode(encode(snap(u, IntGrid(4), z), IntGrid(4), z), IntGrid(4), z), snap(u, IntGrid(4), z))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_the_argument_is_left_alone(grid):
    u = torch.randn(8)
    before = u.clone()
    snap(u, grid)
    assert torch.equal(u, before)


def test_floats_saturate():
    for grid in (E2M1, E4M3):
        assert snap(torch.tensor([1e30, -1e30, torch.inf, -torch.inf]), grid).tolist() == [grid.high, grid.low] * 2
