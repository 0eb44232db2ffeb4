"""Tiles cover every element once."""

import pytest

pytest.importorskip("triton")

from qat.kernels.triton.tiles import CHUNKS, TILE, tiles


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("size", [1, 16, 20, 32, 64, 100, 128, 576, 1536, 4096, 5000, 14336, 1 << 20])
@pytest.mark.parametrize("groups", [1, 3, 130])
def test_every_element_is_in_a_tile_and_none_is_larger_than_it_may_be(groups, size, whole):
    cut = tiles(groups, size, whole)
    assert cut.block_g * cut.block_e <= TILE
    assert cut.block_e & (cut.block_e - 1) == cut.block_g & (cut.block_g - 1) == 0
    assert 1 in (cut.parts, cut.chunks)
    assert cut.block_e * cut.parts * cut.chunks >= size > cut.block_e * (cut.parts * cut.chunks - 1)
    assert cut.programs % cut.parts == 0
    assert cut.block_g * cut.programs // cut.parts >= groups
    assert not whole or cut.parts == 1


def test_widths_of_models_leave_no_lane_idle():
    for size in (16, 64, 128, 576, 1536, 4096, 14336):
        cut = tiles(256, size, whole=True)
        assert cut.block_e * cut.chunks == size


def test_a_program_adds_up_few_tiles_whatever_the_size():
    """In groups as large as the gradient's kernel takes; 4544 is a hidden size that only 64 divides."""
    for size in (*range(1, 1 << 15, 97), 4544, 6848, 32704, 1 << 15):
        assert tiles(256, size, whole=True).chunks <= CHUNKS
