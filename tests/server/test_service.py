"""The service's parts that need no socket; `test_app.py` has the rest of it."""

import asyncio
import json
from contextlib import nullcontext

import pytest
from fastapi import Request
from starlette.requests import ClientDisconnect

from qat.server.protocol import CompletionRequest
from qat.server.refusal import Refusal
from qat.server.service import EventStream, Service, event, unless_gone


def request(messages):
    """A request whose client sends these messages, and nothing after them."""
    left = list(messages)

    async def receive():
        if left:
            return left.pop(0)
        await asyncio.Event().wait()

    return Request({"type": "http", "method": "POST", "path": "/", "headers": []}, receive)


def test_an_event():
    text = "é\n\r\u2028\x85\x1e"
    assert event({"text": text}).splitlines() == [event({"text": text}).strip(), ""]
    assert json.loads(event({"text": text})[6:]) == {"text": text}


def test_work_ends_when_the_client_is_gone():
    ended = []

    async def work():
        try:
            await asyncio.sleep(30)
        finally:
            ended.append(True)

    async def main():
        asked = request([{"type": "http.request", "body": b""}, {"type": "http.disconnect"}])
        assert await asyncio.wait_for(unless_gone(asked, work()), 5) is None
        await asyncio.sleep(0)
        assert ended == [True]
        assert await unless_gone(request([]), asyncio.sleep(0.01, "done")) == "done"
        with pytest.raises(ZeroDivisionError):
            await unless_gone(request([]), fail())
        await asyncio.sleep(0)
        assert len(asyncio.all_tasks()) == 1, "somebody still waits for the client"

    async def fail():
        return 1 / 0

    asyncio.run(main())


@pytest.mark.parametrize("fails", [True, False])
def test_a_stream_says_when_it_is_over_however_it_ends(fails):
    over = []

    async def events():
        yield "data: 1\n\n"
        await asyncio.sleep(30 if fails else 0)

    async def send(message):
        if fails and message["type"] == "http.response.body":
            raise OSError("the client is gone")

    async def main():
        stream = EventStream(events(), lambda: over.append(True))
        scope = {"type": "http", "asgi": {"spec_version": "2.4"}}
        with pytest.raises(ClientDisconnect) if fails else nullcontext():
            await asyncio.wait_for(stream(scope, request([]).receive, send), 5)
        assert over == [True]

    asyncio.run(main())


def test_a_checkpoint_without_a_tokenizer_takes_tokens(build, monkeypatch):
    llm = build()
    monkeypatch.setattr(llm, "_tokenizer", None)
    service = Service(llm, "tiny", 1)

    async def ask(**body):
        asked = CompletionRequest.model_validate({"model": "tiny", "prompt": [5], "max_tokens": 4} | body)
        response = await service.respond(request([]), asked)
        return json.loads(response.body)

    async def main():
        service.worker.start()
        try:
            answer = await ask(ignore_eos=True)
            assert (answer["choices"][0]["text"], answer["usage"]["completion_tokens"]) == ("", 4)
            for body in ({"prompt": "a"}, {"stop": "x"}, {"logprobs": 1}):
                with pytest.raises(Refusal, match="holds no tokenizer"):
                    await ask(**body)
        finally:
            await service.close()

    asyncio.run(main())
