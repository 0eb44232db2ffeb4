"""Who computes what: oldest first, decodes beside prefills, the youngest gives way."""

from qat.engine.block_manager import BlockManager
from qat.engine.config import SamplingParams
from qat.engine.scheduler import Chunk, Scheduler
from qat.engine.sequence import Sequence


def make(num_blocks: int = 100, block_size: int = 4, seats: int = 8, budget: int = 16) -> Scheduler:
    return Scheduler(BlockManager(num_blocks, block_size), seats, budget)


def add(scheduler: Scheduler, id: int, length: int) -> Sequence:
    sequence = Sequence(id, (1,) * length, SamplingParams(), max_len=1000)
    scheduler.add(sequence)
    return sequence


def step(scheduler: Scheduler) -> list[tuple[int, int, int]]:
    """One step, as the engine does it; what was computed as (id, start, stop)."""
    chunks: list[Chunk] = scheduler.schedule()
    for chunk in chunks:
        chunk.sequence.num_computed = chunk.stop
        if chunk.yields:
            chunk.sequence.output.append(0)
    scheduler.blocks.check_integrity([*scheduler.running, *scheduler.waiting])
    return [(c.sequence.id, c.start, c.stop) for c in chunks]


def test_prompts_are_chunked_to_the_budget_and_join_decodes() -> None:
    scheduler = make(budget=6)
    add(scheduler, 0, 4)
    add(scheduler, 1, 9)
    assert step(scheduler) == [(0, 0, 4), (1, 0, 2)]
    assert step(scheduler) == [(0, 4, 5), (1, 2, 7)]
    assert step(scheduler) == [(0, 5, 6), (1, 7, 9)]
    assert step(scheduler) == [(0, 6, 7), (1, 9, 10)]


def test_a_prefill_leaves_room_for_younger_decodes() -> None:
    scheduler = make(budget=6)
    old, young = add(scheduler, 0, 3), add(scheduler, 1, 2)
    step(scheduler)
    old.output += [0] * 20  # as if much of it had to be computed anew
    assert step(scheduler) == [(0, 3, 8), (1, 2, 3)]
    assert young.num_uncomputed == 1


def test_the_oldest_progresses_even_where_decodes_could_fill_the_step() -> None:
    scheduler = make(budget=2)
    sequences = [add(scheduler, i, 1) for i in range(3)]
    step(scheduler), step(scheduler)
    sequences[0].output += [0] * 5
    assert step(scheduler)[0][0] == 0


def test_seats_are_limited() -> None:
    scheduler = make(seats=2)
    for i in range(3):
        add(scheduler, i, 1)
    assert step(scheduler) == [(0, 0, 1), (1, 0, 1)]
    scheduler.remove(scheduler.running[0])
    assert step(scheduler) == [(1, 1, 2), (2, 0, 1)]


def test_the_youngest_gives_way_and_keeps_its_age() -> None:
    scheduler = make(num_blocks=6, block_size=2, budget=12)
    sequences = [add(scheduler, i, 3) for i in range(3)]
    step(scheduler)
    while not scheduler.num_preemptions:
        step(scheduler)
    assert [s.id for s in scheduler.running] == [0, 1]
    assert [s.id for s in scheduler.waiting] == [2]
    assert sequences[2].num_preemptions == 1
    assert sequences[2].block_table == []
    add(scheduler, 3, 1)
    assert [s.id for s in scheduler.waiting] == [2, 3]
    scheduler.remove(sequences[0])
    scheduler.remove(sequences[1])
    length = len(sequences[2])
    assert step(scheduler)[0] == (2, 0, length)  # prompt and output, computed anew


def test_who_cannot_take_from_a_younger_one_waits_with_its_blocks() -> None:
    scheduler = make(num_blocks=4, block_size=2, budget=12)
    old, young = add(scheduler, 0, 3), add(scheduler, 1, 3)
    step(scheduler), step(scheduler)
    assert [len(s.block_table) for s in (old, young)] == [2, 2]
    young.output += [0]
    assert [c[0] for c in step(scheduler)] == [0]
    assert scheduler.num_preemptions == 1  # the old one took a block
    assert [s.id for s in scheduler.waiting] == [1]


def test_admission_leaves_the_others_room_to_grow() -> None:
    scheduler = make(num_blocks=4, block_size=2)
    add(scheduler, 0, 4)
    step(scheduler)
    add(scheduler, 1, 3)
    assert [c[0] for c in step(scheduler)] == [0]  # two blocks are free, but one of them is what 0 needs next
    scheduler.remove(scheduler.running[0])
    assert [c[0] for c in step(scheduler)] == [1]


def test_those_admitted_together_leave_each_other_room_to_grow() -> None:
    scheduler = make(num_blocks=4, block_size=2)
    add(scheduler, 0, 4)
    add(scheduler, 1, 4)
    assert [c[0] for c in step(scheduler)] == [0]  # both prompts would fit, and no token more
    assert scheduler.num_preemptions == 0


def test_removal_frees_from_either_queue() -> None:
    scheduler = make(seats=1)
    first, second = add(scheduler, 0, 5), add(scheduler, 1, 5)
    step(scheduler)
    scheduler.remove(second)
    scheduler.remove(first)
    assert scheduler.blocks.num_free == 100
    assert scheduler.schedule() == []
