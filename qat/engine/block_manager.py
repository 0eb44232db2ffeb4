"""BlockManager: which block of the cache belongs to which sequence. Knows nothing of what is in them."""

from collections import Counter, deque
from collections.abc import Iterable

from qat.engine.sequence import Sequence


class BlockManager:
    """The pool of blocks.

    Blocks are counted by reference, so that a block can once be shared by sequences with a common beginning; today each
    has one holder.

    Args:
        num_blocks: Blocks in the pool.
        block_size: Tokens in a block.
    """

    def __init__(self, num_blocks: int, block_size: int):
        self.num_blocks, self.block_size = num_blocks, block_size
        self._free = deque(range(num_blocks))  # what was freed first is used first
        self._references = [0] * num_blocks

    @property
    def num_free(self) -> int:
        """Blocks that belong to nobody."""
        return len(self._free)

    @property
    def num_tokens(self) -> int:
        """Tokens that the whole pool holds."""
        return self.num_blocks * self.block_size

    def num_missing(self, sequence: Sequence, length: int) -> int:
        """Blocks that a sequence lacks to hold its first `length` tokens."""
        return max(0, -(-length // self.block_size) - len(sequence.block_table))

    def can_allocate(self, sequence: Sequence, length: int) -> bool:
        """Whether the sequence's first `length` tokens can have their blocks now."""
        return self.num_missing(sequence, length) <= len(self._free)

    def allocate(self, sequence: Sequence, length: int) -> None:
        """Gives a sequence the blocks that it lacks to hold its first `length` tokens; ask `can_allocate` before."""
        missing = self.num_missing(sequence, length)
        assert missing <= len(self._free)
        for _ in range(missing):
            block = self._free.popleft()
            assert self._references[block] == 0
            self._references[block] = 1
            sequence.block_table.append(block)

    def free(self, sequence: Sequence) -> None:
        """Takes a sequence's blocks back, the last one first, so that its beginning is overwritten last."""
        for block in reversed(sequence.block_table):
            assert self._references[block] > 0
            self._references[block] -= 1
            if self._references[block] == 0:
                self._free.append(block)
        sequence.block_table.clear()
        sequence.num_computed = 0

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Asserts that the pool is whole.

        Every block is free or referenced by as many tables as its count says, free + used == total, no table holds a
        block twice, and every table has exactly the blocks that its sequence's cached tokens need.

        Args:
            sequences: All that have not ended, waiting ones included.
        """
        sequences = list(sequences)
        held = Counter(block for sequence in sequences for block in sequence.block_table)
        assert len(set(self._free)) == len(self._free), "a block is free twice"
        assert not set(self._free) & set(held), "a block is free and in use"
        assert len(self._free) + len(held) == self.num_blocks, (
            f"{self.num_blocks - len(self._free)} used, {len(held)} held"
        )
        for block, count in enumerate(self._references):
            assert held[block] == count, f"block {block}: {count} references, {held[block]} holders"
        for sequence in sequences:
            table = sequence.block_table
            assert len(set(table)) == len(table), f"request {sequence.id} holds a block twice"
            needed = -(-sequence.num_computed // self.block_size)
            assert len(table) == needed, (
                f"request {sequence.id}: {len(table)} blocks for {sequence.num_computed} tokens"
            )
