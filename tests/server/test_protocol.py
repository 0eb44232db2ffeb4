import pytest
from pydantic import ValidationError

from qat.engine.config import SamplingParams
from qat.server.protocol import ChatRequest, CompletionRequest, Message

TURN = [{"role": "user", "content": "hi"}]


def completion(**body):
    return CompletionRequest.model_validate({"model": "m", "prompt": "a"} | body)


def chat(**body):
    return ChatRequest.model_validate({"model": "m", "messages": TURN} | body)


def test_everything_that_is_asked_for_reaches_the_sampler():
    body = {"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "seed": 3, "stop": ["x", "y"]}
    body |= {"stop_token_ids": [4], "ignore_eos": True, "max_tokens": 9}
    expected = SamplingParams(**body, logprobs=2)
    assert completion(**body, logprobs=2).params(100) == expected
    assert chat(**body, logprobs=True, top_logprobs=2).params(100) == expected


def test_what_is_left_out_is_openais_default():
    assert completion().params(100) == SamplingParams(max_tokens=16, temperature=1.0)
    assert chat().params(100) == SamplingParams(max_tokens=100, temperature=1.0)
    assert chat(logprobs=True).params(9).logprobs == 0
    assert completion(logprobs=0).params(9).logprobs == 0


def test_null_is_left_out():
    names = set(CompletionRequest.model_fields) - {"model", "prompt"}
    assert completion(**dict.fromkeys(names)) == completion()
    names = set(ChatRequest.model_fields) - {"model", "messages"}
    assert chat(**dict.fromkeys(names)) == chat()


def test_what_clients_send_without_meaning_anything_by_it():
    chat(n=1, frequency_penalty=0, presence_penalty=0.0, user="me", stream=False)
    completion(n=1, echo=False, user="me", stream=True, stream_options={"include_usage": False})
    assert completion(stop="x").stop == ["x"]
    assert chat(max_tokens=5, max_completion_tokens=5).params(100).max_tokens == 5


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1], [2, 3]], [[1], [2, 3]]),
    ],
)
def test_prompts(prompt, prompts):
    assert completion(prompt=prompt).prompt == prompts


@pytest.mark.parametrize("prompt", [[], [True], ["a", [1]], [[1], "a"], [1.0], None, 3, {"a": 1}, [["a"]], [[True]]])
def test_what_is_no_prompt(prompt):
    with pytest.raises(ValidationError, match="expected a text, a list of texts"):
        completion(prompt=prompt)


def test_messages_as_templates_take_them():
    def rendered(**fields):
        return Message(**fields).rendered()

    assert rendered(role="user", content="a") == {"role": "user", "content": "a"}
    assert rendered(role="developer", content="a") == {"role": "system", "content": "a"}
    assert rendered(role="user", content="a", name="Ada") == {"role": "user", "content": "a", "name": "Ada"}
    parts = [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]
    assert rendered(role="user", content=parts)["content"] == "a b"


@pytest.mark.parametrize(
    "content",
    [None, 3, [], ["a"], [{"type": "text"}], [{"type": "text", "text": 3}], [{"type": "text", "text": "a", "x": 1}]],
)
def test_what_is_no_text(content):
    with pytest.raises(ValidationError, match="expected a text, or a list of"):
        Message(role="user", content=content)


@pytest.mark.parametrize("field", ["best_of", "logit_bias", "tools", "suffix", "whatever"])
def test_a_field_that_is_not_served_is_refused(field):
    for make in (completion, chat):
        with pytest.raises(ValidationError, match=rf"(?s){field}.*extra_forbidden"):
            make(**{field: 1})
    with pytest.raises(ValidationError, match="extra_forbidden"):
        chat(messages=[TURN[0] | {field: 1}])
