"""Worker: the thread that owns the LLM and steps it. Knows nothing of HTTP.

An event loop submits prompts and gets deltas back; it never waits for a step. Prompts and departures go into two lists
that the thread empties between steps; it sleeps when there is nothing to do.
"""

import asyncio
import logging
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from qat.engine.config import SamplingParams
from qat.engine.llm import LLM, Delta

log = logging.getLogger(__name__)


class QueueFull(Exception):
    """There is no place for another prompt now."""


class Closed(Exception):
    """The worker takes no more prompts: it is shutting down, or its engine has failed."""


@dataclass(eq=False)
class Ticket:
    """A prompt that was accepted.

    Attributes:
        index: Its place among the prompts that came with it.
        prompt: Token ids.
        params: How to sample.
        deltas: Where its output arrives as `(index, delta)`, together with that of the prompts that came with it; the
            last one has a `finish_reason`.
        id: The engine's number, once it has one. The thread's alone.
    """

    index: int
    prompt: Sequence[int]
    params: SamplingParams
    deltas: asyncio.Queue[tuple[int, Delta]] = field(repr=False)
    id: int | None = None


class Worker:
    """Runs an LLM for an event loop. Every method but `_...` is called from that loop's thread.

    Args:
        llm: The model; nobody else drives it.
        max_queue: Prompts that are accepted beyond the `max_num_seqs` that run at a time.
    """

    def __init__(self, llm: LLM, max_queue: int):
        self.llm, self.capacity = llm, llm.config.max_num_seqs + max_queue
        self.failure: str | None = None
        self.closing = False
        self._deadline = float("inf")
        self._changed = threading.Condition()  # guards what follows, up to the thread's own
        self._open: set[Ticket] = set()
        self._arrived: list[Ticket] = []
        self._left: list[Ticket] = []
        self._tickets: dict[int, Ticket] = {}  # of the thread alone: what the engine has
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    @property
    def num_open(self) -> int:
        """Prompts that were accepted and have not ended."""
        return len(self._open)

    def start(self) -> None:
        """Starts the thread, for the event loop that runs now."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def submit(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Ticket]:
        """Accepts prompts, all or none; they have passed `Engine.check`.

        Raises:
            QueueFull: They are too many now.
            Closed: The worker is shutting down, or has failed.
        """
        with self._changed:
            if self.failure or self.closing:
                raise Closed(self.failure or "the server is shutting down")
            if len(self._open) + len(prompts) > self.capacity:
                raise QueueFull(f"{len(self._open)} prompts run or wait, and {self.capacity} is the limit")
            deltas: asyncio.Queue[tuple[int, Delta]] = asyncio.Queue()
            tickets = [Ticket(index, prompt, params, deltas) for index, prompt in enumerate(prompts)]
            self._open.update(tickets)
            self._arrived += tickets
            self._changed.notify()
        return tickets

    def abort(self, tickets: Sequence[Ticket]) -> None:
        """Ends prompts; those that have ended already are left alone."""
        with self._changed:
            left = [ticket for ticket in tickets if ticket in self._open]
            self._open.difference_update(left)
            self._left += left
            self._changed.notify()

    def drain(self, seconds: float) -> None:
        """Takes no more prompts; those that were accepted have so long to end, then they end with an error."""
        with self._changed:
            self.closing = True
            self._deadline = min(self._deadline, time.monotonic() + seconds)
            self._changed.notify()

    def close(self) -> None:
        """Ends what is left, and the thread."""
        self.drain(0)
        if self._thread.ident is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            while self._take():
                if self._tickets:
                    self._deliver([(self._tickets.get(delta.id), delta) for delta in self.llm.step()])
                if not self._tickets:
                    self.llm.check_integrity()
            self.llm.check_integrity()
        except BaseException as error:
            log.critical("the engine has failed; the server answers 503 from here on", exc_info=error)
            self._fail(f"the engine has failed ({type(error).__name__}: {error})")

    def _take(self) -> bool:
        """Waits for something to do and tells the engine who came and who left; False when all is done and closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._arrived or self._left or self._tickets or self.closing)
            arrived, self._arrived = self._arrived, []
            left, self._left = self._left, []
        for ticket in arrived:
            self._add(ticket)
        for ticket in left:
            if ticket.id is not None and self._tickets.pop(ticket.id, None) is not None:
                self.llm.abort(ticket.id)
        if self._tickets and time.monotonic() >= self._deadline:
            self._end_all("the server is shutting down, and the time to finish is over")
        return bool(self._tickets) or not self.closing

    def _add(self, ticket: Ticket) -> None:
        """Gives a prompt to the engine; what goes wrong with it is its own failure."""
        try:
            ticket.id = self.llm.submit(ticket.prompt, ticket.params)
        except Exception as error:
            self._deliver([(ticket, _error(f"it could not be queued ({error})"))])
        else:
            self._tickets[ticket.id] = ticket

    def _end_all(self, message: str) -> None:
        ended = list(self._tickets.values())
        for id in self._tickets:
            self.llm.abort(id)
        self._deliver([(ticket, _error(message)) for ticket in ended])

    def _fail(self, message: str) -> None:
        with self._changed:
            self.failure = message
            lost = list(self._open)
        self._deliver([(ticket, _error(message)) for ticket in lost])

    def _deliver(self, pairs: list[tuple[Ticket | None, Delta]]) -> None:
        """Sends deltas to the loop in one message; what ends is forgotten, and who has left gets nothing."""
        known = [(ticket, delta) for ticket, delta in pairs if ticket is not None]
        ended = [ticket for ticket, delta in known if delta.finish_reason]
        for ticket in ended:
            if ticket.id is not None:
                self._tickets.pop(ticket.id, None)
        with self._changed:
            self._open.difference_update(ended)
        assert self._loop is not None
        if known:
            with suppress(RuntimeError):  # a loop that was closed: then nobody waits for the answer
                self._loop.call_soon_threadsafe(_put, known)


def _put(pairs: list[tuple[Ticket, Delta]]) -> None:
    for ticket, delta in pairs:
        ticket.deltas.put_nowait((ticket.index, delta))


def _error(message: str) -> Delta:
    return Delta(-1, "", finish_reason="error", message=message)
