"""The HTTP application: OpenAI's routes over a worker."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from qat.engine.llm import LLM
from qat.server.answer import Answer
from qat.server.limit import BodyLimit
from qat.server.protocol import ChatRequest, CompletionRequest
from qat.server.refusal import Refusal, install, of_value
from qat.server.worker import Closed, QueueFull, Ticket, Worker

GONE = Response(status_code=499)  # nobody reads it


class EventStream(StreamingResponse):
    """Server-sent events that tell when they are over: sent whole, or the client is gone."""

    def __init__(self, events: AsyncIterator[str], over: Callable[[], None]):
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        self._over = over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._over()


def create(llm: LLM, name: str, max_queue: int) -> FastAPI:
    """The application. `app.state.worker` is its worker, which lives as long as the application's lifespan.

    Args:
        llm: The model; from here on nobody else drives it.
        name: What clients call it.
        max_queue: Prompts that are accepted beyond those that run at a time.
    """
    worker = Worker(llm, max_queue)
    encoder = ThreadPoolExecutor(1, "encoder")  # one: a tokenizer is not safe to share
    created = int(time.time())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        await asyncio.to_thread(worker.close)
        encoder.shutdown()

    app = FastAPI(title=f"qat serves {name}", lifespan=lifespan)
    app.state.worker = worker
    app.add_middleware(BodyLimit)
    install(app)

    def described() -> dict[str, Any]:
        facts = {"id": name, "object": "model", "created": created, "owned_by": "qat"}
        return facts | {"max_model_len": llm.engine.max_model_len}

    @app.get("/health")
    async def health() -> JSONResponse:
        if worker.failure or worker.closing:
            raise Refusal(503, worker.failure or "the server is shutting down")
        return JSONResponse({"status": "ok", "open": worker.num_open})

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [described()]}

    @app.get("/v1/models/{model:path}")
    async def model(model: str) -> dict[str, Any]:
        check_model(model)
        return described()

    @app.post("/v1/completions")
    async def completions(request: Request, body: CompletionRequest) -> Response:
        return await respond(request, body, lambda: [llm.encode(prompt) for prompt in body.prompt])

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        return await respond(request, body, lambda: [llm.encode_chat([m.rendered() for m in body.messages])])

    def check_model(asked: str) -> None:
        if asked != name:
            raise Refusal(404, f"model {asked!r} not found; this server has {name!r}", "model", "model_not_found")

    async def respond(
        request: Request, body: CompletionRequest | ChatRequest, encode: Callable[[], list[list[int]]]
    ) -> Response:
        check_model(body.model)
        tickets = await accept(body, encode)
        num_prompt_tokens = sum(len(ticket.prompt) for ticket in tickets)
        answer = Answer(isinstance(body, ChatRequest), name, tickets[0].params.logprobs is not None, piece)
        if body.stream:
            events = stream(answer, tickets, num_prompt_tokens, body.include_usage)
            return EventStream(events, lambda: worker.abort(tickets))
        try:
            outputs = await unless_gone(request, collect(tickets))
            return GONE if outputs is None else JSONResponse(answer.whole(num_prompt_tokens, outputs))
        finally:
            worker.abort(tickets)

    async def accept(
        body: CompletionRequest | ChatRequest, encode: Callable[[], list[list[int]]]
    ) -> list[Ticket]:
        """Checks everything that can be wrong with a request, and queues it."""

        def checked() -> list[list[int]]:
            prompts = encode()
            for prompt in prompts:
                llm.engine.check(prompt, params)
            if params.stop or params.logprobs is not None:
                assert llm.tokenizer
            return prompts

        try:
            params = body.params(llm.engine.max_model_len)
            prompts = await asyncio.get_running_loop().run_in_executor(encoder, checked)
            if len(prompts) > worker.capacity:
                raise ValueError(f"prompt: {len(prompts)} at once; this server takes {worker.capacity}")
        except ValueError as error:
            raise of_value(error, set(type(body).model_fields)) from None
        try:
            return worker.submit(prompts, params)
        except QueueFull as error:
            raise Refusal(429, f"the queue is full: {error}; try again later", code="queue_full") from None
        except Closed as error:
            raise Refusal(503, str(error)) from None

    async def collect(tickets: Sequence[Ticket]) -> list[list[Any]]:
        """Every delta of every ticket."""
        outputs: list[list[Any]] = [[] for _ in tickets]
        async for index, delta in arriving(tickets):
            outputs[index].append(delta)
        return outputs

    async def arriving(tickets: Sequence[Ticket]) -> AsyncIterator[tuple[int, Any]]:
        """Deltas as they come, until all tickets have ended."""
        left = len(tickets)
        while left:
            index, delta = await tickets[0].deltas.get()
            if delta.finish_reason == "error":
                raise Refusal(503 if worker.closing else 500, delta.message)
            left -= delta.finish_reason is not None
            yield index, delta

    async def stream(
        answer: Answer, tickets: Sequence[Ticket], num_prompt_tokens: int, include_usage: bool
    ) -> AsyncIterator[str]:
        lengths, new = [0] * len(tickets), 0
        if answer.chat:
            yield event(answer.opening())
        try:
            async for index, delta in arriving(tickets):
                new += len(delta.token_ids)
                if delta.text or delta.finish_reason or answer.logprobs:
                    yield event(answer.chunk(index, delta, lengths[index]))
                lengths[index] += len(delta.text)
            if include_usage:
                yield event(answer.closing(num_prompt_tokens, new))
        except Refusal as refusal:
            yield event(refusal.body())
        yield "data: [DONE]\n\n"

    def piece(token: int) -> str:
        return llm.tokenizer.decode([token], clean_up_tokenization_spaces=False)

    return app


def event(content: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


async def unless_gone(request: Request, work: Any) -> Any:
    """What a coroutine returns; None if the client is gone before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return tasks[0].result() if tasks[0].done() else None
    finally:
        for task in tasks:
            task.cancel()
