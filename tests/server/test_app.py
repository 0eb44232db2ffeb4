"""The server on a real socket, asked by OpenAI's own client where it can."""

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest

from qat.engine.config import SamplingParams
from qat.server.limit import MAX_BODY

GREEDY = {"temperature": 0, "model": "tiny"}
ON = {"ignore_eos": True}  # not OpenAI's: goes through the client's extra_body
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


def expected(llm, prompt, **params):
    """What the engine says of a prompt by itself; the server must not be stepping."""
    return llm.generate([prompt], SamplingParams(ignore_eos=True, **params))[0]


@pytest.fixture(scope="module")
def alone(build):
    """An LLM that no server drives."""
    return build()


def post(serving, path="/completions", **body):
    return serving.http.post(path, json={"model": "tiny"} | body)


def error_of(response, status):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return error


def test_a_completion(serving, alone):
    whole = expected(alone, "def f(x):", max_tokens=24)
    got = serving.client.completions.create(prompt="def f(x):", max_tokens=24, extra_body=ON, **GREEDY)
    assert (got.choices[0].text, got.choices[0].finish_reason) == (whole.text, "length")
    assert got.object == "text_completion"
    assert (got.usage.prompt_tokens, got.usage.completion_tokens, got.usage.total_tokens) == (9, 24, 33)
    assert len(set(whole.token_ids)) >= 8, "a model that says too little proves little"


def test_a_completion_is_16_tokens_long_where_nothing_is_said(serving):
    got = serving.client.completions.create(prompt="x", extra_body=ON, **GREEDY)
    assert got.usage.completion_tokens == 16


def test_prompts_of_every_kind(serving, alone):
    ids = alone.encode("abc")
    kinds = [["abc", "xyz"], [ids, alone.encode("xyz")]]
    texts = [expected(alone, prompt, max_tokens=12).text for prompt in ("abc", "xyz")]
    for prompt in kinds:
        got = serving.client.completions.create(prompt=prompt, max_tokens=12, extra_body=ON, **GREEDY)
        assert [choice.text for choice in got.choices] == texts
        assert [choice.index for choice in got.choices] == [0, 1]
        assert got.usage.completion_tokens == 24
        streamed = ["", ""]
        for chunk in serving.client.completions.create(
            prompt=prompt, max_tokens=12, stream=True, extra_body=ON, **GREEDY
        ):
            streamed[chunk.choices[0].index] += chunk.choices[0].text
        assert streamed == texts
    got = serving.client.completions.create(prompt=ids, max_tokens=12, extra_body=ON, **GREEDY)
    assert got.choices[0].text == texts[0]


def test_a_chat(serving, alone):
    whole = expected(alone, alone.encode_chat(MESSAGES), max_tokens=20)
    got = serving.client.chat.completions.create(messages=MESSAGES, max_tokens=20, extra_body=ON, **GREEDY)
    assert got.choices[0].message.content == whole.text
    assert got.choices[0].message.role == "assistant"
    assert got.choices[0].finish_reason == "length"
    again = [*MESSAGES, got.choices[0].message, {"role": "user", "content": [{"type": "text", "text": "More"}]}]
    more = serving.client.chat.completions.create(messages=again, max_completion_tokens=5, extra_body=ON, **GREEDY)
    turns = [*MESSAGES, {"role": "assistant", "content": whole.text}, {"role": "user", "content": "More"}]
    assert more.choices[0].message.content == expected(alone, alone.encode_chat(turns), max_tokens=5).text


def test_a_chat_goes_on_to_the_end_of_the_model(serving):
    got = serving.client.chat.completions.create(messages=MESSAGES, extra_body=ON, **GREEDY)
    assert got.usage.total_tokens == 256
    assert got.choices[0].finish_reason == "length"


@pytest.mark.parametrize("usage", [True, False])
def test_a_chat_streams(serving, alone, usage):
    whole = expected(alone, alone.encode_chat(MESSAGES), max_tokens=20)
    options = {"stream_options": {"include_usage": True}} if usage else {}
    chunks = list(
        serving.client.chat.completions.create(
            messages=MESSAGES, max_tokens=20, stream=True, extra_body=ON, **options, **GREEDY
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    spoken = [chunk for chunk in chunks if chunk.choices]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in spoken) == whole.text
    assert len(spoken) > 4
    assert [chunk.choices[0].finish_reason for chunk in spoken[-2:]] == [None, "length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    if usage:
        assert chunks[-1].choices == []
        assert chunks[-1].usage.completion_tokens == 20
    else:
        assert len(spoken) == len(chunks)
        assert all(chunk.usage is None for chunk in chunks)


def test_the_stream_ends_as_openai_says(serving):
    with serving.http.stream("POST", "/completions", json=GREEDY | {"prompt": "a", "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = response.read().decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(event.startswith("data: {") for event in events[:-2])


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("listed", [True, False])
def test_a_stop_string_ends_the_text_before_it(serving, alone, stream, listed):
    whole = expected(alone, "def f(x):", max_tokens=40).text
    stop = whole[9:12]
    asked = {"stop": ["never there", stop] if listed else stop, "max_tokens": 40, "extra_body": ON, **GREEDY}
    got = serving.client.completions.create(prompt="def f(x):", stream=stream, **asked)
    if stream:
        chunks = list(got)
        text, reason = "".join(chunk.choices[0].text for chunk in chunks), chunks[-1].choices[0].finish_reason
    else:
        text, reason = got.choices[0].text, got.choices[0].finish_reason
    assert (text, reason) == (whole[: whole.index(stop)], "stop")
    serving.wait_until_free()


def test_stop_tokens_and_seeds(serving, alone):
    tokens = expected(alone, "abc", max_tokens=30).token_ids
    body = ON | {"stop_token_ids": [tokens[9]]}
    got = serving.client.completions.create(prompt="abc", max_tokens=30, extra_body=body, **GREEDY)
    assert got.choices[0].finish_reason == "stop"
    assert got.usage.completion_tokens == tokens.index(tokens[9]) + 1
    params = {"temperature": 1.0, "top_p": 0.9, "seed": 7, "max_tokens": 20}
    got = serving.client.completions.create(
        model="tiny", prompt="abc", extra_body=ON | {"top_k": 50, "min_p": 0.01}, **params
    )
    assert got.choices[0].text == expected(alone, "abc", top_k=50, min_p=0.01, **params).text


def test_logprobs_of_a_chat(serving, alone):
    whole = expected(alone, alone.encode_chat(MESSAGES), max_tokens=6, logprobs=3)
    asked = {"messages": MESSAGES, "max_tokens": 6, "logprobs": True, "top_logprobs": 3, "extra_body": ON, **GREEDY}
    got = serving.client.chat.completions.create(**asked).choices[0].logprobs.content
    assert [entry.logprob for entry in got] == pytest.approx(whole.logprobs)
    assert [[pair.logprob for pair in entry.top_logprobs] for entry in got] == [
        pytest.approx([logprob for _, logprob in top]) for top in whole.top_logprobs
    ]
    assert [entry.token for entry in got] == [alone.tokenizer.decode([token]) for token in whole.token_ids]
    chunks = serving.client.chat.completions.create(stream=True, **asked)
    streamed = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert streamed == got
    plain = serving.client.chat.completions.create(messages=MESSAGES, max_tokens=2, **GREEDY)
    assert plain.choices[0].logprobs is None


def test_logprobs_of_a_completion(serving, alone):
    whole = expected(alone, "abc", max_tokens=6, logprobs=2)
    asked = {"prompt": "abc", "max_tokens": 6, "logprobs": 2, "extra_body": ON, **GREEDY}
    got = serving.client.completions.create(**asked).choices[0].logprobs
    assert got.token_logprobs == pytest.approx(whole.logprobs)
    assert [max(top.values()) for top in got.top_logprobs] == pytest.approx([top[0][1] for top in whole.top_logprobs])
    assert got.text_offset[0] == 0
    assert got.text_offset == sorted(got.text_offset)
    chunks = list(serving.client.completions.create(stream=True, **asked))
    assert [place for chunk in chunks for place in chunk.choices[0].logprobs.text_offset] == got.text_offset


def test_models_and_health(serving):
    assert [model.id for model in serving.client.models.list()] == ["tiny"]
    assert serving.client.models.retrieve("tiny").owned_by == "qat"
    with pytest.raises(openai.NotFoundError, match="'other' not found; this server has 'tiny'"):
        serving.client.models.retrieve("other")
    root = serving.url.removesuffix("/v1")
    assert serving.http.get(root + "/health").json() == {"status": "ok", "open": 0}


def test_an_unknown_model_route_or_method(serving):
    for path, body in (("/completions", {"prompt": "a"}), ("/chat/completions", {"messages": MESSAGES})):
        error = error_of(post(serving, path, model="other", **body), 404)
        assert (error["param"], error["code"]) == ("model", "model_not_found")
    assert "/v1/nothing" in error_of(post(serving, "/nothing"), 404)["message"]
    response = serving.http.get("/completions")
    error_of(response, 405)
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("prompt", {"prompt": ""}),
        ("prompt", {"prompt": []}),
        ("prompt", {"prompt": ["a", 1]}),
        ("prompt", {"prompt": [[1], []]}),
        ("prompt", {"prompt": [256]}),
        ("prompt", {"prompt": [-1]}),
        ("prompt", {"prompt": [1] * 256}),
        ("prompt", {"prompt": ["a"] * 100}),
        ("prompt", {"prompt": "\ud800"}),
        ("prompt", {}),
        ("temperature", {"temperature": -1}),
        ("temperature", {"temperature": float("nan")}),
        ("temperature", {"temperature": 1e400}),
        ("temperature", {"temperature": True}),
        ("temperature", {"temperature": "1"}),
        ("top_p", {"top_p": 0}),
        ("top_k", {"top_k": -5}),
        ("min_p", {"min_p": 2}),
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": 1.5}),
        ("seed", {"seed": 2**70}),
        ("stop", {"stop": ""}),
        ("stop", {"stop": [3]}),
        ("stop_token_ids", {"stop_token_ids": [256]}),
        ("logprobs", {"logprobs": 21}),
        ("logprobs", {"logprobs": True}),
        ("n", {"n": 2}),
        ("echo", {"echo": True}),
        ("frequency_penalty", {"frequency_penalty": 0.5}),
        ("presence_penalty", {"presence_penalty": -1}),
        ("stream_options", {"stream_options": {"include_usage": True}}),
        ("stream_options", {"stream": True, "stream_options": {"what": 1}}),
        ("best_of", {"best_of": 2}),
        ("logit_bias", {"logit_bias": {"5": 1}}),
        ("model", {"model": None}),
    ],
    ids=str,
)
def test_bad_values_name_their_field(serving, param, body):
    content = json.dumps({"model": "tiny"} | ({} if body == {} else {"prompt": "a"}) | body)
    response = serving.http.post("/completions", content=content, headers={"content-type": "application/json"})
    error = error_of(response, 400)
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param, error
    assert param in error["message"]
    assert serving.app.state.worker.num_open == 0


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("messages", {"messages": []}),
        ("messages", {"messages": "hello"}),
        ("messages", {"messages": [{"role": "boss", "content": "x"}]}),
        ("messages", {"messages": [{"role": "user", "content": None}]}),
        ("messages", {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}),
        ("messages", {"messages": [{"role": "user", "content": "x", "colour": 1}]}),
        ("messages", {"messages": [{"role": "user", "content": "x" * 300}]}),
        ("top_logprobs", {"top_logprobs": 3}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("max_completion_tokens", {"max_completion_tokens": 3, "max_tokens": 4}),
        ("max_completion_tokens", {"max_completion_tokens": 0}),
        ("tools", {"tools": []}),
        ("response_format", {"response_format": {"type": "json_object"}}),
    ],
    ids=str,
)
def test_bad_chats_name_their_field(serving, param, body):
    error = error_of(post(serving, "/chat/completions", **({"messages": MESSAGES} | body)), 400)
    assert error["param"] == param, error


def test_a_prompt_that_is_too_long_says_both_limits(serving):
    message = error_of(post(serving, prompt=[1] * 300), 400)["message"]
    assert "300 tokens" in message
    assert "model length of 256" in message


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'"x"', b"\xff\xfe", b'{"model": "tiny", "prompt": "\xff"}', b"[" * 100_000]
)
def test_what_is_no_json_object(serving, content):
    headers = {"content-type": "application/json"}
    error_of(serving.http.post("/completions", content=content, headers=headers), 400)
    assert serving.http.get("/models").status_code == 200


def test_a_body_whose_type_is_not_said(serving):
    response = serving.http.post("/completions", data={"a": 1})
    assert "Content-Type" in error_of(response, 400)["message"]


def test_a_body_without_end_is_refused(serving):
    def pieces():
        for _ in range(MAX_BODY // 2**20 + 1):
            yield b" " * 2**20

    headers = {"content-type": "application/json"}
    error_of(serving.http.post("/completions", content=pieces(), headers=headers), 413)


def test_concurrent_streams_are_each_what_they_are_alone(serve, alone):
    prompts = [f"{'word ' * (i % 5)}{i}:" for i in range(12)]
    texts = [expected(alone, prompt, max_tokens=40).text for prompt in prompts]
    assert len(set(texts)) == 12

    with serve(num_blocks=60, max_num_seqs=6, max_num_batched_tokens=16) as serving:

        def ask(prompt):
            chunks = serving.client.completions.create(
                prompt=prompt, max_tokens=40, stream=True, extra_body=ON, **GREEDY
            )
            return "".join(chunk.choices[0].text for chunk in chunks)

        with ThreadPoolExecutor(12) as pool:
            assert list(pool.map(ask, prompts)) == texts
        assert serving.llm.engine.stats()["preemptions"] > 0, "the pool was to be too small"
        serving.wait_until_free()


@pytest.mark.parametrize(("path", "stream"), [("/completions", True), ("/chat/completions", False)])
def test_a_client_that_leaves_frees_its_blocks(serve, slow, path, stream):
    with serve(max_num_seqs=1) as serving:
        slow(serving.llm)
        asked = {"prompt": "abc"} if path == "/completions" else {"messages": MESSAGES}
        body = json.dumps(GREEDY | ON | asked | {"max_tokens": 200, "stream": stream}).encode()
        head = (
            f"POST /v1{path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        )
        address = ("127.0.0.1", int(serving.url.split(":")[2].split("/")[0]))
        sockets = [socket.create_connection(address) for _ in range(2)]  # the second one waits for the first
        for one in sockets:
            one.sendall(head.encode() + b"\r\n" + body)
        while serving.llm.engine.stats()["generated_tokens"] < 5 or serving.app.state.worker.num_open < 2:
            time.sleep(0.005)
        if stream:
            assert b"200 OK" in sockets[0].recv(100)
        for one in sockets:
            one.close()
        serving.wait_until_free(1)  # 200 tokens would take longer
        stats = serving.llm.engine.stats()
        assert stats["abort"] == 2
        assert stats["generated_tokens"] < 100
        assert serving.app.state.worker.num_open == 0
        assert post(serving, prompt="abc").status_code == 200


def test_a_full_queue(serve, slow):
    with serve(max_num_seqs=1, max_queue=1) as serving:
        slow(serving.llm)
        asked = {"prompt": "abc", "max_tokens": 30, "stream": True, "extra_body": ON, **GREEDY}
        streams = [serving.client.completions.create(**asked) for _ in range(2)]
        response = post(serving, prompt="abc")
        assert error_of(response, 429)["code"] == "queue_full"
        assert response.headers["retry-after"]
        with pytest.raises(openai.RateLimitError, match="queue is full"):
            serving.client.chat.completions.create(messages=MESSAGES, **GREEDY)
        assert error_of(post(serving, prompt=["a", "b", "c"]), 400)["param"] == "prompt"
        for stream in streams:
            assert list(stream)[-1].choices[0].finish_reason == "length"
        assert post(serving, prompt="abc").status_code == 200


def test_what_fails_for_one_request_is_its_own(serving, monkeypatch):
    decode = serving.llm.tokenizer.decode

    def fail(tokens, **options):
        if threading.current_thread().name == "engine" and 90 in tokens:
            raise RuntimeError("no such text")
        return decode(tokens, **options)

    monkeypatch.setattr(serving.llm.tokenizer, "decode", fail)
    body = {"prompt": [90, 5], "max_tokens": 8, **GREEDY, **ON}
    assert "no such text" in error_of(post(serving, **body), 500)["message"]
    with pytest.raises(openai.APIError, match="no such text"):
        list(serving.client.completions.create(stream=True, prompt=[90, 5], **GREEDY))
    assert post(serving, prompt=[5], max_tokens=2).status_code == 200
    serving.wait_until_free()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_that_fails_answers_everyone(serve, slow):
    with serve(max_num_seqs=1) as serving:
        slow(serving.llm)
        asked = {"prompt": "abc", "max_tokens": 100, "extra_body": ON, **GREEDY}
        stream = serving.client.completions.create(stream=True, **asked)
        with ThreadPoolExecutor(1) as pool:
            whole = pool.submit(post, serving, prompt="x")
            while serving.app.state.worker.num_open < 2:
                time.sleep(0.005)

            def fail():
                raise RuntimeError("illegal memory access")

            serving.llm.step = fail
            with pytest.raises(openai.APIError, match="illegal memory access"):
                list(stream)
            assert "illegal memory access" in error_of(whole.result(), 500)["message"]
        assert "engine has failed" in error_of(post(serving, prompt="x"), 503)["message"]
        error_of(serving.http.get(serving.url.removesuffix("/v1") + "/health"), 503)


@pytest.mark.parametrize("seconds", [10, 0.1])
def test_what_runs_at_shutdown_ends_in_time(serve, slow, seconds):
    with ThreadPoolExecutor(1) as pool, serve(max_num_seqs=1, drain_seconds=seconds) as serving:
        slow(serving.llm)
        asked = {"prompt": "abc", "max_tokens": 40, "stream": True, "extra_body": ON, **GREEDY}
        streams = [serving.client.completions.create(**asked) for _ in range(2)]
        whole = pool.submit(post, serving, prompt="abc")
        while serving.app.state.worker.num_open < 3:
            time.sleep(0.005)
        serving.server.should_exit = True
        if seconds == 10:
            assert [list(stream)[-1].choices[0].finish_reason for stream in streams] == ["length", "length"]
            assert whole.result().status_code == 200
        else:
            for stream in streams:
                with pytest.raises(openai.APIError, match="shutting down"):
                    list(stream)
            assert error_of(whole.result(), 503)["message"].startswith("the server is shutting down")
        serving.thread.join(5)
        assert not serving.thread.is_alive()
        with pytest.raises(httpx.ConnectError):
            post(serving, prompt="x")
        serving.wait_until_free()
