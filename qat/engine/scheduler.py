"""Scheduler: which tokens the next step computes. Continuous batching, chunked prefill, preemption by recompute.

Age decides everything. Sequences are served oldest first, and a sequence that lacks blocks takes them from the youngest
that runs. So those that run are always older than those that wait, the oldest always progresses, and every sequence
becomes the oldest in its time: nothing can starve, and no two can take blocks from each other in turn. A sequence keeps
its age through preemption; what it loses are its blocks, which are computed anew when it is admitted again.
"""

from collections import deque
from dataclasses import dataclass

from qat.engine.block_manager import BlockManager
from qat.engine.sequence import Sequence


@dataclass(frozen=True, eq=False)
class Chunk:
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
        while budget and self.num_preemptions == before and self._can_admit():
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            chunks.append(self._allocate(sequence, min(sequence.num_uncomputed, budget)))
            budget -= chunks[-1].stop - chunks[-1].start
        return chunks

    def _chunk(self, place: int, budget: int) -> Chunk | None:
        """What the running sequence at `place` computes; None if it lacks blocks and none is younger."""
        sequence = self.running[place]
        count = sequence.num_uncomputed
        if count > 1:  # a prefill leaves room for the younger ones that decode, so that they don't stutter
            decoding = sum(younger.num_uncomputed == 1 for younger in self.running[place + 1 :])
            count = min(count, max(1, budget - decoding))
        while not self.blocks.can_allocate(sequence, sequence.num_computed + count):
            if self.running[-1] is sequence:
                return None
            self.preempt()
        return self._allocate(sequence, count)

    def _can_admit(self) -> bool:
        """Whether the oldest waiting sequence may run.

        Its tokens must find room beside the next token of everyone who runs: a sequence that is admitted too early is
        soon preempted, and what it computed is lost.
        """
        if not self.waiting or len(self.running) >= self.max_num_seqs:
            return False
        growth = sum(self.blocks.num_missing(s, len(s) + 1) for s in self.running)
        head = self.waiting[0]
        return self.blocks.num_missing(head, len(head)) + growth <= self.blocks.num_free

    def _allocate(self, sequence: Sequence, count: int) -> Chunk:
        start = sequence.num_computed
        self.blocks.allocate(sequence, start + count)
        return Chunk(sequence, start, start + count)
