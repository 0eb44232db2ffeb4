import pytest

from qat.numerics.grid import IntGrid


@pytest.mark.parametrize("bits", range(1, 9))
def test_levels_are_those_of_twos_complement(bits):
    grid = IntGrid(bits)
    assert grid.qmax - grid.qmin == grid.steps == 2**bits - 1
    assert -grid.qmin == grid.qmax + 1 == 2 ** (bits - 1)


@pytest.mark.parametrize("bits", [0, 9, -1, 4.0, "4", True, None])
def test_other_widths_are_refused_by_value(bits):
    with pytest.raises(ValueError, match=f"bits={bits!r}"):
        IntGrid(bits)
