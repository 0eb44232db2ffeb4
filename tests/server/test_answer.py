from itertools import chain

import pytest

from qat.engine.llm import Delta
from qat.server.answer import Answer

PIECES = {1: "a", 2: "b", 3: "\ufffd", 4: "\ufffd", 5: "é"}
DELTAS = [
    Delta(0, "", (3,), None, (-1.0,), (((3, -1.0), (4, -2.0)),)),
    Delta(0, "éa", (1,), None, (-0.5,), (((1, -0.5), (2, -3.0)),)),
    Delta(0, "b", (2,), "stop", (-0.25,), (((5, -0.1), (2, -0.25)),)),
]


def answer(chat, logprobs=True):
    return Answer(chat, "m", logprobs, PIECES.__getitem__)


def test_a_whole_chat():
    made = answer(True, logprobs=False).whole(7, [DELTAS])
    assert made["object"] == "chat.completion"
    assert made["id"].startswith("chatcmpl-")
    assert made["usage"] == {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
    assert made["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "éab", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]


def test_whole_completions_of_two_prompts():
    made = answer(False, logprobs=False).whole(7, [DELTAS, DELTAS[2:]])
    assert made["object"] == "text_completion"
    assert [(c["index"], c["text"], c["finish_reason"]) for c in made["choices"]] == [
        (0, "éab", "stop"),
        (1, "b", "stop"),
    ]
    assert made["usage"]["completion_tokens"] == 4


def test_logprobs_of_a_chat():
    content = answer(True).whole(7, [DELTAS])["choices"][0]["logprobs"]["content"]
    assert [entry["token"] for entry in content] == ["\ufffd", "a", "b"]
    assert [entry["bytes"] for entry in content] == [None, [97], [98]]
    assert content[2]["top_logprobs"] == [
        {"token": "é", "logprob": -0.1, "bytes": [195, 169]},
        {"token": "b", "logprob": -0.25, "bytes": [98]},
    ]


def test_logprobs_of_a_completion():
    logprobs = answer(False).whole(7, [DELTAS])["choices"][0]["logprobs"]
    assert logprobs == {
        "tokens": ["\ufffd", "a", "b"],
        "token_logprobs": [-1.0, -0.5, -0.25],
        "top_logprobs": [{"\ufffd": -1.0}, {"a": -0.5, "b": -3.0}, {"é": -0.1, "b": -0.25}],
        "text_offset": [0, 0, 2],
    }


@pytest.mark.parametrize("chat", [True, False])
def test_the_pieces_of_a_stream_add_up(chat):
    made = answer(chat)
    whole = made.whole(7, [DELTAS])["choices"][0]
    chunks, offset = [], 0
    for delta in DELTAS:
        chunks.append(made.chunk(0, delta, offset))
        offset += len(delta.text)
    assert {chunk["id"] for chunk in chunks} == {made.whole(7, [DELTAS])["id"]}
    choices = [chunk["choices"][0] for chunk in chunks]
    assert [choice["finish_reason"] for choice in choices] == [None, None, "stop"]
    if chat:
        assert [choice["delta"] for choice in choices] == [{}, {"content": "éa"}, {"content": "b"}]
        assert made.opening()["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert [*chain(*(choice["logprobs"]["content"] for choice in choices))] == whole["logprobs"]["content"]
    else:
        assert "".join(choice["text"] for choice in choices) == whole["text"]
        for key, values in whole["logprobs"].items():
            assert [*chain(*(choice["logprobs"][key] for choice in choices))] == values
    closing = made.closing(7, 3)
    assert closing["choices"] == []
    assert closing["usage"] == made.whole(7, [DELTAS])["usage"]
