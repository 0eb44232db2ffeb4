"""Service: from a request that is well formed to its response. Routes are `app.py`'s."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from qat.engine.llm import LLM, Delta
from qat.server.answer import Answer
from qat.server.protocol import ChatRequest, CompletionRequest
from qat.server.refusal import Refusal, of_value
from qat.server.worker import Closed, QueueFull, Ticket, Worker

T = TypeVar("T")
GONE = 499  # the status of a response that nobody reads


class Service:
    """Answers requests by a model.

    Args:
        llm: The model; from here on nobody else drives it.
        name: What clients call it.
        max_queue: Prompts that are accepted beyond those that run at a time.
    """

    def __init__(self, llm: LLM, name: str, max_queue: int):
        self.llm, self.name = llm, name
        self.worker = Worker(llm, max_queue)
        self._encoder = ThreadPoolExecutor(1, "encoder")  # one: a tokenizer is not made to be shared

    async def close(self) -> None:
        """Ends everything that still runs."""
        await asyncio.to_thread(self.worker.close)
        self._encoder.shutdown()

    def check_model(self, name: str) -> None:
        """Raises a refusal unless this is the model that is served."""
        if name != self.name:
            text = f"model {name!r} not found; this server has {self.name!r}"
            raise Refusal(404, text, "model", "model_not_found")

    async def respond(self, request: Request, body: CompletionRequest | ChatRequest) -> Response:
        """The response to a request; one whose client is gone ends at once and holds nothing any more."""
        self.check_model(body.model)
        tickets = await self._accept(body)
        answer = Answer(isinstance(body, ChatRequest), self.name, tickets[0].params.logprobs is not None, self._piece)
        count = sum(len(ticket.prompt) for ticket in tickets)
        if body.stream:
            events = self._stream(answer, tickets, count if body.include_usage else None)
            return EventStream(events, lambda: self.worker.abort(tickets))
        try:
            outputs = await unless_gone(request, self._collect(tickets))
            return Response(status_code=GONE) if outputs is None else JSONResponse(answer.whole(count, outputs))
        finally:
            self.worker.abort(tickets)

    async def _accept(self, body: CompletionRequest | ChatRequest) -> list[Ticket]:
        """Checks everything that can be wrong with a request, and queues it."""
        try:
            params = body.params(self.llm.engine.max_model_len)

            def encode() -> list[list[int]]:
                prompts = self._encode(body)
                for prompt in prompts:
                    self.llm.engine.check(prompt, params)
                if params.stop or params.logprobs is not None:
                    _ = self.llm.tokenizer  # raises ValueError if there is none
                return prompts

            prompts = await asyncio.get_running_loop().run_in_executor(self._encoder, encode)
            if len(prompts) > self.worker.capacity:
                raise ValueError(f"prompt: {len(prompts)} at once; this server takes {self.worker.capacity}")
        except ValueError as error:
            raise of_value(error, set(type(body).model_fields)) from None
        try:
            return self.worker.submit(prompts, params)
        except QueueFull as error:
            raise Refusal(429, f"the queue is full: {error}; try again later", code="queue_full") from None
        except Closed as error:
            raise Refusal(503, str(error)) from None

    def _encode(self, body: CompletionRequest | ChatRequest) -> list[list[int]]:
        if isinstance(body, ChatRequest):
            return [self.llm.encode_chat([message.rendered() for message in body.messages])]
        return [self.llm.encode(prompt) for prompt in body.prompt]

    async def _arriving(self, tickets: Sequence[Ticket]) -> AsyncIterator[tuple[int, Delta]]:
        """Deltas of tickets that came together, until all have ended."""
        left = len(tickets)
        while left:
            index, delta = await tickets[0].deltas.get()
            if delta.finish_reason == "error":
                raise Refusal(503 if self.worker.closing else 500, delta.message)
            left -= delta.finish_reason is not None
            yield index, delta

    async def _collect(self, tickets: Sequence[Ticket]) -> list[list[Delta]]:
        outputs: list[list[Delta]] = [[] for _ in tickets]
        async for index, delta in self._arriving(tickets):
            outputs[index].append(delta)
        return outputs

    async def _stream(self, answer: Answer, tickets: Sequence[Ticket], count: int | None) -> AsyncIterator[str]:
        """Events of a stream; with `count`, the tokens of the prompts, the last one tells the usage."""
        lengths, new = [0] * len(tickets), 0
        if answer.chat:
            yield event(answer.opening())
        try:
            async for index, delta in self._arriving(tickets):
                new += len(delta.token_ids)
                if delta.text or delta.finish_reason or answer.logprobs:
                    yield event(answer.chunk(index, delta, lengths[index]))
                lengths[index] += len(delta.text)
            if count is not None:
                yield event(answer.closing(count, new))
        except Refusal as refusal:
            yield event(refusal.body())
        yield "data: [DONE]\n\n"

    def _piece(self, token: int) -> str:
        text = self.llm.tokenizer.decode([token], clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


class EventStream(StreamingResponse):
    """Server-sent events that tell when they are over: all of them sent, or the client gone."""

    def __init__(self, events: AsyncIterator[str], over: Callable[[], None]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._over = over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._over()


def event(content: dict[str, Any]) -> str:
    """A server-sent event. In ASCII: some clients take U+2028 for the end of a line."""
    return f"data: {json.dumps(content)}\n\n"


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """What a coroutine returns; None if the client is gone before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, leaving = asyncio.create_task(work), asyncio.create_task(gone())
    try:
        await asyncio.wait([task, leaving], return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        leaving.cancel()
