"""Blocks are neither lost nor given twice, and the check that says so bites."""

import pytest

from qat.engine.block_manager import BlockManager
from qat.engine.config import SamplingParams
from qat.engine.sequence import Sequence


def sequence(id: int = 0) -> Sequence:
    return Sequence(id, (1,) * 50, SamplingParams(), max_len=60)


def filled(manager: BlockManager, length: int, id: int = 0) -> Sequence:
    held = sequence(id)
    manager.allocate(held, length)
    held.num_computed = length
    return held


@pytest.mark.parametrize(("length", "blocks"), [(0, 0), (1, 1), (4, 1), (5, 2), (16, 4)])
def test_allocates_what_the_tokens_need(length: int, blocks: int) -> None:
    manager = BlockManager(4, 4)
    held = filled(manager, length)
    assert len(held.block_table) == blocks
    assert manager.num_free == 4 - blocks
    assert manager.num_missing(held, 16) == 4 - blocks
    assert manager.can_allocate(held, 16)
    assert not manager.can_allocate(held, 17)
    manager.check_integrity([held])


def test_grows_in_place_and_frees_the_tail_first() -> None:
    manager = BlockManager(6, 2)
    held = filled(manager, 3)
    first = list(held.block_table)
    manager.allocate(held, 7)
    assert held.block_table[:2] == first
    held.num_computed = 7
    manager.check_integrity([held])
    tail_first = held.block_table[::-1]
    manager.free(held)
    assert (held.block_table, held.num_computed, manager.num_free) == ([], 0, 6)
    other = filled(manager, 12, id=1)
    assert other.block_table[2:] == tail_first  # after the two that had never been used
    manager.check_integrity([held, other])


def test_asking_for_more_than_there_is_is_our_bug() -> None:
    with pytest.raises(AssertionError):
        BlockManager(2, 2).allocate(sequence(), 5)


def corrupt_lost(manager: BlockManager, held: Sequence) -> None:
    manager._free.pop()


def corrupt_twice_free(manager: BlockManager, held: Sequence) -> None:
    manager._free.append(manager._free[0])


def corrupt_free_in_use(manager: BlockManager, held: Sequence) -> None:
    manager._free.append(held.block_table[0])


def corrupt_shared(manager: BlockManager, held: Sequence) -> None:
    held.block_table[0] = held.block_table[1]


def corrupt_length(manager: BlockManager, held: Sequence) -> None:
    held.num_computed -= 3


def corrupt_count(manager: BlockManager, held: Sequence) -> None:
    manager._references[held.block_table[0]] = 2


@pytest.mark.parametrize(
    "corrupt",
    [corrupt_lost, corrupt_twice_free, corrupt_free_in_use, corrupt_shared, corrupt_length, corrupt_count],
)
def test_the_check_bites(corrupt) -> None:
    manager = BlockManager(8, 2)
    held = filled(manager, 5)
    manager.check_integrity([held])
    corrupt(manager, held)
    with pytest.raises(AssertionError):
        manager.check_integrity([held])
