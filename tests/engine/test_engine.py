"""The engine under random operations: every request ends, no block leaks, and nobody's tokens depend on the others.

The model is a fake whose next token is a hash of the cache that it READS through the block tables, so a page mixed up
anywhere shows as another token.
"""

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from qat.engine import sampler
from qat.engine.block_manager import BlockManager
from qat.engine.config import EngineConfig, SamplingParams
from qat.engine.engine import Engine, Event
from qat.engine.scheduler import Chunk
from qat.engine.sequence import Sequence as Request

VOCAB = 32
ROWS = torch.randn(64, VOCAB, generator=torch.Generator().manual_seed(0)) * 2


class HashRunner:
    """Stores (token, position) in every slot and reads them all back to pick a row of logits."""

    def __init__(self, num_blocks: int, block_size: int):
        self.size, self.slots = block_size, [(-1, -1)] * (num_blocks * block_size)

    def forward(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        rows = []
        for c in chunks:
            table, size = c.sequence.block_table, self.size
            for position, token in enumerate(c.sequence.tokens(c.start, c.stop), c.start):
                self.slots[table[position // size] * size + position % size] = (token, position)
        for c in chunks:
            table, size = c.sequence.block_table, self.size
            read = [self.slots[table[p // size] * size + p % size] for p in range(c.stop)]
            rows += [0] * (c.stop - c.start - 1) + [row_of(read)]
        return torch.tensor(rows)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return ROWS[hidden]


def row_of(cache: list[tuple[int, int]]) -> int:
    return hash(tuple(cache)) % len(ROWS)


def alone(prompt: tuple[int, ...], params: SamplingParams, count: int) -> list[int]:
    """What a request says by itself: no engine, no blocks."""
    tokens = list(prompt)
    for _ in range(count):
        row = ROWS[row_of([(token, position) for position, token in enumerate(tokens)])]
        token = int(row.argmax())
        if params.temperature > 0:
            assert params.seed is not None
            u = sampler.uniforms([params.seed], [len(tokens)])
            token = int(sampler.draw(sampler.filtered(row[None], [params]), u))
        tokens.append(token)
    return tokens[len(prompt) :]


def build(
    num_blocks: int = 16, block_size: int = 4, max_model_len: int = 64, eos: tuple[int, ...] = (), **sizes: int
) -> Engine:
    config = EngineConfig(block_size=block_size, **sizes)
    return Engine(HashRunner(num_blocks, block_size), config, num_blocks, max_model_len, VOCAB, eos)


def drain(engine: Engine) -> dict[int, list[Event]]:
    events: dict[int, list[Event]] = {}
    while engine.has_unfinished():
        for event in engine.step():
            events.setdefault(event.id, []).append(event)
        engine.check_integrity()
    assert engine.blocks.num_free == engine.blocks.num_blocks
    return events


def tokens_of(events: list[Event]) -> list[int]:
    return [event.token for event in events if event.token is not None]


def random_request(rng: random.Random, engine: Engine) -> tuple[tuple[int, ...], SamplingParams]:
    longest = min(engine.max_model_len - 1, engine.blocks.num_tokens)
    prompt = tuple(rng.randrange(VOCAB) for _ in range(rng.randint(1, rng.choice([4, longest]))))
    sampled = rng.random() < 0.3
    params = SamplingParams(
        max_tokens=rng.choice([1, 3, 12, 60]),
        temperature=0.9 if sampled else 0.0,
        top_p=0.8,
        seed=rng.getrandbits(40) if sampled else None,
        stop_token_ids=[rng.randrange(VOCAB)] if rng.random() < 0.3 else [],
    )
    return prompt, params


def torture(engine: Engine, steps: int, seed: int) -> int:
    """Random arrivals, aborts and preemptions; returns the number of requests that were checked."""
    rng = random.Random(seed)
    asked: dict[int, tuple[tuple[int, ...], SamplingParams]] = {}
    said: dict[int, list[int]] = {}
    ended: dict[int, str] = {}
    done = 0
    while done < steps or engine.has_unfinished():
        if done < steps and len(asked) - len(ended) < 12 and rng.random() < 0.25:
            prompt, params = random_request(rng, engine)
            id = engine.add_request(prompt, params)
            asked[id], said[id] = (prompt, params), []
        if rng.random() < 0.02 and asked:
            id = rng.choice(list(asked))
            assert engine.abort(id) == (id not in ended)
            ended.setdefault(id, "abort")
        if rng.random() < 0.05 and engine.scheduler.running:
            engine.scheduler.preempt()
        for event in engine.step():
            assert event.id not in ended
            assert event.token is not None
            said[event.id].append(event.token)
            if event.finish_reason:
                ended[event.id] = event.finish_reason
        engine.check_integrity()
        done += 1
        assert done < steps + 5000, "something never ends"
    assert set(ended) == set(asked)
    assert engine.blocks.num_free == engine.blocks.num_blocks
    for id, (prompt, params) in asked.items():
        assert said[id] == alone(prompt, params, len(said[id])), f"request {id} was disturbed"
        room = min(params.max_tokens, engine.max_model_len - len(prompt), engine.blocks.num_tokens + 1 - len(prompt))
        if ended[id] == "length":
            assert len(said[id]) == room
        elif ended[id] == "stop":
            assert said[id][-1] in params.stop_token_ids
    return len(asked)


SHAPES = [
    {"num_blocks": 14, "block_size": 3, "max_num_seqs": 5, "max_num_batched_tokens": 7},
    {"num_blocks": 40, "block_size": 1, "max_num_seqs": 8, "max_num_batched_tokens": 16},
    {"num_blocks": 5, "block_size": 16, "max_num_seqs": 3, "max_num_batched_tokens": 1},
    {"num_blocks": 12, "block_size": 5, "max_num_seqs": 64, "max_num_batched_tokens": 64},
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_twenty_thousand_random_steps(shape: dict[str, int]) -> None:
    engine = build(**shape)
    assert torture(engine, 5000, seed=shape["num_blocks"]) > 60
    assert engine.scheduler.num_preemptions > 40
    counts = engine.stats()
    assert min(counts["stop"], counts["length"], counts["abort"]) > 1


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(20))
def test_a_hundred_thousand_random_steps(seed: int) -> None:
    torture(build(**SHAPES[seed % len(SHAPES)]), 5000, seed=100 + seed)


def leak(manager: BlockManager, request: Request) -> None:
    if len(request.block_table) > 2:
        request.block_table.pop()


def swap(manager: BlockManager, request: Request) -> None:
    request.block_table[:] = request.block_table[::-1]


def steal(manager: BlockManager, request: Request) -> None:
    if len(request.block_table) > 2:
        request.block_table[0] = (request.block_table[0] + 1) % manager.num_blocks


def share(manager: BlockManager, request: Request) -> None:
    """A block that somebody else uses, counted as if it was meant so: the tokens alone can tell."""
    others = [b for b, count in enumerate(manager._references) if count and b not in request.block_table]
    if others:
        own, request.block_table[-1] = request.block_table[-1], others[0]
        manager._references[own], manager._references[others[0]] = 0, 2
        manager._free.append(own)


def keep(manager: BlockManager, request: Request) -> None:
    """A sequence without blocks believes that its cache is still there: what preemption took is not computed anew."""
    request.num_computed = max(0, len(request) - 1)


@pytest.mark.parametrize("sabotage", [leak, swap, steal, share, keep])
@pytest.mark.parametrize("integrity", [True, False])
def test_the_torture_bites(sabotage: Callable, integrity: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A corrupted table or a lost block fails the run: by integrity, or by the tokens alone."""
    calls = 0
    free, allocate = BlockManager.free, BlockManager.allocate

    def bad_free(self: BlockManager, request: Request) -> None:
        nonlocal calls
        calls += 1
        if sabotage is leak and calls > 20:
            leak(self, request)
        free(self, request)
        if sabotage is keep:
            keep(self, request)

    def bad_allocate(self: BlockManager, request: Request, length: int) -> None:
        nonlocal calls
        allocate(self, request, length)
        calls += 1
        if sabotage not in (leak, keep) and calls % 20 == 0:
            sabotage(self, request)

    monkeypatch.setattr(BlockManager, "free", bad_free)
    monkeypatch.setattr(BlockManager, "allocate", bad_allocate)
    if not integrity:
        monkeypatch.setattr(Engine, "check_integrity", lambda self: None)
    with pytest.raises((AssertionError, IndexError)):
        torture(build(**SHAPES[0]), 300, seed=1)


def test_neighbours_and_preemption_leave_draws_alone() -> None:
    params = SamplingParams(max_tokens=20, temperature=1.0, seed=5)
    expected = alone((1, 2, 3), params, 20)
    engine = build(num_blocks=9, block_size=4)
    ids = [engine.add_request((1, 2, 3), params) for _ in range(3)]
    other = engine.add_request((4,), replace(params, seed=6))
    events = drain(engine)
    assert engine.scheduler.num_preemptions > 0
    assert all(tokens_of(events[id]) == expected for id in ids)
    assert tokens_of(events[other]) == alone((4,), replace(params, seed=6), 20)


def test_draws_without_a_seed_differ() -> None:
    engine = build(num_blocks=64)
    ids = [engine.add_request((1, 2, 3), SamplingParams(max_tokens=16, temperature=1.0)) for _ in range(8)]
    events = drain(engine)
    assert len({tuple(tokens_of(events[id])) for id in ids}) > 1


def test_the_oldest_progresses_in_every_step() -> None:
    engine = build(num_blocks=6, block_size=4, max_num_batched_tokens=3)
    for i in range(8):
        engine.add_request(tuple(range(1, 10 + i)), SamplingParams(max_tokens=8))
    while engine.has_unfinished():
        oldest = engine.scheduler.running[0] if engine.scheduler.running else engine.scheduler.waiting[0]
        before = (oldest.num_computed, len(oldest))
        engine.step()
        assert (oldest.num_computed, len(oldest)) > before or not oldest.block_table  # or it has ended


def test_decoding_goes_on_beside_a_long_prefill() -> None:
    engine = build(num_blocks=64, max_num_batched_tokens=6)
    young = []
    old = engine.add_request(tuple(range(1, 31)), SamplingParams(max_tokens=4))
    engine.step()
    young = [engine.add_request((i,), SamplingParams(max_tokens=6)) for i in (1, 2)]
    while len(engine.scheduler.running) < 3:
        engine.step()
    assert {event.id for event in engine.step()} >= set(young) - {old}


def test_reasons_to_end() -> None:
    free_run = alone((1, 2), SamplingParams(), 40)
    engine = build(eos=(free_run[3],), num_blocks=16, max_model_len=20)
    first = free_run.index(free_run[3]) + 1
    ids = [
        engine.add_request((1, 2), SamplingParams(max_tokens=40)),
        engine.add_request((1, 2), SamplingParams(max_tokens=40, ignore_eos=True)),
        engine.add_request((1, 2), SamplingParams(max_tokens=40, ignore_eos=True, stop_token_ids=[free_run[1]])),
        engine.add_request((1, 2), SamplingParams(max_tokens=2)),
    ]
    events = drain(engine)
    assert [tokens_of(events[id]) for id in ids[:2]] == [free_run[:first], free_run[:18]]
    assert tokens_of(events[ids[2]]) == free_run[: free_run.index(free_run[1]) + 1]
    assert tokens_of(events[ids[3]]) == free_run[:2]
    assert [events[id][-1].finish_reason for id in ids] == ["stop", "length", "stop", "length"]


@pytest.mark.parametrize("block_size", [1, 3, 4])
def test_outgrowing_the_pool_alone_ends_as_length(block_size: int) -> None:
    engine = build(num_blocks=4, block_size=block_size, max_model_len=1000)
    id = engine.add_request((1,), SamplingParams(max_tokens=500))
    events = drain(engine)[id]
    assert events[-1].finish_reason == "length"
    assert tokens_of(events) == alone((1,), SamplingParams(), 4 * block_size)  # the last token needs no slot


def test_prompts_up_to_the_limits_and_not_beyond() -> None:
    engine = build(num_blocks=3, block_size=4, max_model_len=64)
    drained = engine.add_request((1,) * 12, SamplingParams())
    assert [e.finish_reason for e in drain(engine)[drained]] == ["length"]
    with pytest.raises(ValueError, match=r"13 tokens.* model length of 64 .* pool of 12 tokens"):
        engine.add_request((1,) * 13, SamplingParams())
    engine = build(num_blocks=30, block_size=4, max_model_len=16)
    id = engine.add_request((1,) * 15, SamplingParams())
    assert len(drain(engine)[id]) == 1
    with pytest.raises(ValueError, match="model length of 16"):
        engine.add_request((1,) * 16, SamplingParams())


@pytest.mark.parametrize("prompt", [(), (VOCAB,), (-1,), (True,), (1.5,), ("a",), (1, None)])
def test_bad_prompts_disturb_nobody(prompt: tuple) -> None:
    engine = build()
    id = engine.add_request((1, 2, 3), SamplingParams(max_tokens=5))
    engine.step()
    with pytest.raises(ValueError, match="prompt"):
        engine.add_request(prompt, SamplingParams())
    with pytest.raises(ValueError, match="stop_token_ids"):
        engine.add_request((1,), SamplingParams(stop_token_ids=[VOCAB]))
    assert engine.stats()["requests"] == 1
    assert tokens_of(drain(engine)[id]) == alone((1, 2, 3), SamplingParams(), 5)[1:]


def test_abort_at_any_moment_and_again() -> None:
    engine = build(num_blocks=8, max_num_seqs=1, max_num_batched_tokens=4)
    running = engine.add_request(tuple(range(10)), SamplingParams())
    queued = engine.add_request((3,), SamplingParams(max_tokens=3))
    gone = engine.add_request((4,), SamplingParams())
    assert engine.abort(gone)  # while queued
    engine.step()
    assert engine.abort(running)  # in the middle of its prefill
    assert not engine.abort(running)
    assert not engine.abort(12345)
    events = drain(engine)
    assert set(events) == {queued}
    assert not engine.abort(queued)  # after its end
    assert engine.stats()["abort"] == 2
    assert engine.step() == []


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_finite_end_their_request_alone(poison: float, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build()
    ids = [engine.add_request((i,), SamplingParams(max_tokens=6, temperature=i % 2, seed=1)) for i in range(4)]

    def logits(hidden: torch.Tensor) -> torch.Tensor:
        rows = ROWS[hidden].clone()
        if engine.stats()["steps"] == 3:
            rows[2, 7] = poison
        return rows

    monkeypatch.setattr(engine.runner, "logits", logits)
    events = drain(engine)
    assert events[ids[2]][-1].finish_reason == "error"
    assert "not finite" in events[ids[2]][-1].message
    assert len(events[ids[2]]) == 3
    for i in (0, 1, 3):
        assert tokens_of(events[ids[i]]) == alone((i,), SamplingParams(temperature=i % 2, seed=1), 6)
    assert engine.stats()["error"] == 1


def test_running_out_of_memory_fails_the_batch_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = build(max_num_seqs=2)
    ids = [engine.add_request((i,), SamplingParams(max_tokens=3)) for i in range(3)]
    forward = engine.runner.forward

    def fail(chunks: Sequence[Chunk]) -> torch.Tensor:
        monkeypatch.setattr(engine.runner, "forward", forward)
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(engine.runner, "forward", fail)
    events = drain(engine)
    assert [events[id][-1].finish_reason for id in ids] == ["error", "error", "length"]
    assert "no room" in events[ids[0]][0].message


def test_logprobs_come_with_the_tokens() -> None:
    engine = build()
    id = engine.add_request((1,), SamplingParams(max_tokens=4, logprobs=3))
    plain = engine.add_request((1,), SamplingParams(max_tokens=4))
    events = drain(engine)
    for event in events[id]:
        assert event.top[0] == (event.token, event.logprob)
        assert len(event.top) == 3
    assert all(event.logprob is None and event.top == () for event in events[plain])


def test_threads_may_do_anything_at_any_time() -> None:
    engine = build(num_blocks=12, max_num_seqs=4)
    said: dict[int, list[int]] = {}
    stop = threading.Event()
    failures: list[BaseException] = []

    def drive() -> None:
        try:
            while not stop.is_set() or engine.has_unfinished():
                for event in engine.step():
                    said.setdefault(event.id, []).append(event.token)
                engine.check_integrity()
        except BaseException as error:
            failures.append(error)

    def ask(seed: int, ids: list[int]) -> None:
        rng = random.Random(seed)
        for _ in range(40):
            ids.append(engine.add_request((seed, rng.randrange(VOCAB)), SamplingParams(max_tokens=9)))
            if rng.random() < 0.4:
                engine.abort(rng.choice(ids))

    driver = threading.Thread(target=drive)
    asked: list[list[int]] = [[] for _ in range(3)]
    askers = [threading.Thread(target=ask, args=(seed, ids)) for seed, ids in enumerate(asked)]
    for thread in (driver, *askers):
        thread.start()
    for thread in askers:
        thread.join()
    stop.set()
    driver.join()
    assert not failures
    counts = engine.stats()
    assert counts["length"] + counts["abort"] == 120
    assert engine.blocks.num_free == 12
