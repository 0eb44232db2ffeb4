"""The worker alone: an event loop, a thread, and no HTTP."""

import asyncio
import threading
import time

import pytest

from qat.engine.config import SamplingParams
from qat.server.worker import Closed, QueueFull, Worker

PROMPTS = [[65, 66, 67], [70], list(range(40, 70))]


def params(count=12, **more):
    return SamplingParams(max_tokens=count, ignore_eos=True, **more)


@pytest.fixture(scope="module")
def alone(build):
    """What the engine says of each prompt by itself."""
    return [build().generate([prompt], params(40))[0] for prompt in PROMPTS]


async def collect(tickets):
    outputs = [[] for _ in tickets]
    while not all(output and output[-1].finish_reason for output in outputs):
        index, delta = await asyncio.wait_for(tickets[0].deltas.get(), 20)
        outputs[index].append(delta)
    assert tickets[0].deltas.empty()
    return outputs


def tokens(deltas):
    return [token for delta in deltas for token in delta.token_ids]


@pytest.fixture
def run(build):
    """`run(test, max_queue=..., **engine)`: runs `test(worker)` in an event loop, then closes the worker."""

    def run(test, max_queue=8, **engine):
        worker = Worker(build(**engine), max_queue)

        async def main():
            worker.start()
            try:
                await test(worker)
            finally:
                await asyncio.to_thread(worker.close)

        asyncio.run(main())
        return worker

    return run


def whole(worker):
    stats = worker.llm.engine.stats()
    assert stats["free_blocks"] == stats["blocks"]
    assert worker.num_open == stats["running"] == stats["waiting"] == 0
    worker.llm.check_integrity()
    assert worker.failure is None
    return stats


def test_each_prompt_gets_what_it_gets_alone(run, alone):
    async def test(worker):
        together = worker.submit(PROMPTS, params(40))
        later = worker.submit(PROMPTS[:1], params(40))
        outputs = await collect(together) + await collect(later)
        assert [tokens(deltas) for deltas in outputs] == [a.token_ids for a in [*alone, alone[0]]]
        assert "".join(delta.text for delta in outputs[0]) == alone[0].text

    whole(run(test, num_blocks=20, max_num_seqs=3))


def test_an_idle_worker_sleeps_and_wakes(run):
    async def test(worker):
        steps = 0
        step = worker.llm.step

        def counted():
            nonlocal steps
            steps += 1
            return step()

        worker.llm.step = counted
        for _ in range(2):
            before = steps
            await collect(worker.submit([[65]], params(3)))
            assert steps - before == 3
            await asyncio.sleep(0.1)
            assert steps - before == 3

    run(test)


def test_aborting_at_any_moment_and_again(run, slow):
    async def test(worker):
        slow(worker.llm)
        waiting = [worker.submit([[65]], params(150)) for _ in range(3)]
        worker.abort(waiting[2])  # perhaps before the engine has heard of it
        await asyncio.wait_for(waiting[0][0].deltas.get(), 5)
        worker.abort(waiting[1])  # waits in the engine
        worker.abort(waiting[0])
        worker.abort(waiting[0])
        assert worker.num_open == 0
        done = worker.submit([[66]], params(2))
        await collect(done)
        worker.abort(done)

    stats = whole(run(test, max_num_seqs=1))
    assert stats["generated_tokens"] < 100
    assert stats["length"] == 1


def test_who_left_hears_nothing_more(run, slow):
    async def test(worker):
        slow(worker.llm)
        tickets = worker.submit([[65], [66]], params(100))
        await asyncio.wait_for(tickets[0].deltas.get(), 5)
        worker.abort(tickets[:1])
        await asyncio.sleep(0.1)  # what was under way has arrived
        while not tickets[0].deltas.empty():
            tickets[0].deltas.get_nowait()
        heard = [(await asyncio.wait_for(tickets[0].deltas.get(), 5))[0] for _ in range(5)]
        assert set(heard) == {1}

    run(test)


def test_the_queue_has_an_end_and_takes_all_or_none(run, slow):
    async def test(worker):
        slow(worker.llm)
        assert worker.capacity == 3
        first = worker.submit([[65]], params(20))
        with pytest.raises(QueueFull, match="1 prompts run or wait, and 3 is the limit"):
            worker.submit([[65]] * 3, params())
        assert worker.num_open == 1
        second = worker.submit([[65]] * 2, params(20))
        with pytest.raises(QueueFull):
            worker.submit([[65]], params())
        await collect(first)
        third = worker.submit([[65]], params(1))
        await collect(second)
        await collect(third)

    whole(run(test, max_num_seqs=1, max_queue=2))


def test_a_prompt_that_cannot_be_queued_fails_alone(run, alone):
    async def test(worker):
        submit = worker.llm.submit

        def picky(prompt, params):
            if prompt == [13]:
                raise RuntimeError("bad luck")
            return submit(prompt, params)

        worker.llm.submit = picky
        good = worker.submit(PROMPTS[:1], params(40))
        ((failed,),) = await collect(worker.submit([[13]], params()))
        assert failed.finish_reason == "error"
        assert "bad luck" in failed.message
        assert tokens((await collect(good))[0]) == alone[0].token_ids

    whole(run(test))


def test_draining_finishes_what_was_accepted(run, alone):
    async def test(worker):
        tickets = worker.submit(PROMPTS, params(40))
        worker.drain(20)
        with pytest.raises(Closed, match="shutting down"):
            worker.submit([[65]], params())
        outputs = await collect(tickets)
        assert [tokens(deltas) for deltas in outputs] == [a.token_ids for a in alone]

    whole(run(test, max_num_seqs=1))


def test_draining_has_an_end(run, slow):
    async def test(worker):
        slow(worker.llm)
        tickets = worker.submit(PROMPTS, params(200))
        await asyncio.wait_for(tickets[0].deltas.get(), 5)
        start = time.monotonic()
        worker.drain(0.2)
        worker.drain(10)  # a second word does not prolong it
        outputs = await collect(tickets)
        assert 0.1 < time.monotonic() - start < 3
        assert {deltas[-1].finish_reason for deltas in outputs} == {"error"}
        assert "shutting down" in outputs[0][-1].message

    whole(run(test, max_num_seqs=1))


def test_an_engine_that_fails_tells_everyone(run, slow, caplog):
    async def test(worker):
        slow(worker.llm)
        tickets = worker.submit(PROMPTS, params(200))
        await asyncio.wait_for(tickets[0].deltas.get(), 5)

        def fail():
            raise RuntimeError("illegal memory access")

        worker.llm.step = fail
        outputs = await collect(tickets)
        assert all("illegal memory access" in deltas[-1].message for deltas in outputs)
        with pytest.raises(Closed, match="the engine has failed"):
            worker.submit([[65]], params())
        worker.abort(tickets)

    worker = run(test, max_num_seqs=1)
    assert "illegal memory access" in worker.failure
    assert worker.num_open == 0
    assert "the engine has failed" in caplog.text


def test_a_lost_block_is_found_when_nothing_runs(run, caplog):
    async def test(worker):
        await collect(worker.submit([[65]], params(3)))
        assert worker.failure is None
        worker.llm.engine.blocks._free.pop()
        await collect(worker.submit([[65]], params(3)))
        for _ in range(100):
            await asyncio.sleep(0.01)
            if worker.failure:
                break
        assert "AssertionError" in worker.failure

    run(test)


def test_a_worker_that_was_never_started_closes(build):
    worker = Worker(build(), 1)
    worker.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "engine"]
