"""Scheduler: which tokens the next step computes. Continuous batching, chunked prefill, preemption by recompute.

Age decides everything. Sequences are served oldest first, and a sequence that lacks blocks takes them from the youngest
that runs. So those that run are always older than those that wait, the oldest always progresses, and every sequence
becomes the oldest in its time: nothing can starve, and no two can take blocks from each other in turn. A sequence keeps
its age through preemption; what it loses are its blocks, which are computed anew when it is admitted again.
"""

from collections import deque
from typing import NamedTuple

from qat.engine.block_manager import BlockManager
from qat.engine.sequence import Sequence


class Chunk(NamedTuple):
    """Tokens `[start, stop)` of a sequence, to be computed in one step.

    Attributes:
        sequence: Whose tokens they are; its blocks hold all of them.
        start: Tokens that are in the cache already.
        stop: Tokens that are in it after the step.
    """

    sequence: Sequence
    start: int
    stop: int

    @property
    def yields(self) -> bool:
        """Whether the chunk reaches the last token, so that its logits give the next one."""
        return self.stop == len(self.sequence)


class Scheduler:
    """Queues of sequences, and the choice among them.

    Args:
        blocks: The pool.
        max_num_seqs: Sequences that run at a time.
        max_num_batched_tokens: Tokens in a step.
    """

    def __init__(self, blocks: BlockManager, max_num_seqs: int, max_num_batched_tokens: int):
        self.blocks, self.max_num_seqs, self.max_num_batched_tokens = blocks, max_num_seqs, max_num_batched_tokens
        self.waiting: deque[Sequence] = deque()  # both oldest first
        self.running: list[Sequence] = []
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence, younger than all before it."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a sequence out, wherever it is, and frees its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self.blocks.free(sequence)

    def preempt(self) -> None:
        """Sends the youngest running sequence back to wait, without its blocks."""
        sequence = self.running.pop()
        self.blocks.free(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self.waiting.appendleft(sequence)

    def schedule(self) -> list[Chunk]:
        """Chunks of the next step, with their blocks allocated; none only if there is no sequence at all."""
        before = self.num_preemptions
        budget, chunks = self.max_num_batched_tokens, []
        place = 0
        while place < len(self.running) and budget:  # preemption shortens the list, at its far end
            if chunk := self._chunk(place, budget):
                chunks.append(chunk)
                budget -= chunk.stop - chunk.start
            place += 1
        if self.num_preemptions == before:
            self._admit(chunks, budget)
        return chunks

    def _chunk(self, place: int, budget: int) -> Chunk | None:
        """What the running sequence at `place` computes; None if it lacks blocks and none is younger."""
        sequence = self.running[place]
        count = sequence.num_uncomputed
        if count > 1:  # a prefill leaves room for the younger ones that decode, so that they don't stutter
            decoding = sum(younger.num_uncomputed == 1 for younger in self.running[place + 1 :])
            count = min(count, max(1, budget - decoding))
        stop = sequence.num_computed + count
        missing = self.blocks.num_missing(sequence, stop)
        while missing > self.blocks.num_free:
            if self.running[-1] is sequence:
                return None
            self.preempt()
        if missing:
            self.blocks.allocate(sequence, stop)
        return Chunk(sequence, stop - count, stop)

    def _admit(self, chunks: list[Chunk], budget: int) -> None:
        """Lets the oldest that wait run, and adds what they compute to the chunks.

        Their tokens must find room beside the next token of everyone who runs: a sequence that is admitted too early is
        soon preempted, and what it computed is lost.
        """
        blocks, growth = self.blocks, -1  # blocks that those who run need for their next token; -1: not counted yet
        while budget and self.waiting and len(self.running) < self.max_num_seqs:
            if growth < 0:
                growth = sum(blocks.num_missing(s, len(s) + 1) for s in self.running)
            sequence = self.waiting[0]
            if blocks.num_missing(sequence, len(sequence)) + growth > blocks.num_free:
                return
            self.running.append(self.waiting.popleft())
            start, stop = sequence.num_computed, min(len(sequence), sequence.num_computed + budget)
            blocks.allocate(sequence, stop)
            growth += blocks.num_missing(sequence, len(sequence) + 1)
            chunks.append(Chunk(sequence, start, stop))
            budget -= stop - start
