"""What a client may ask for: the requests of OpenAI's API, as far as they are served, with a few engine options more.

A field that is not served is refused, never ignored. `null` means the same as leaving a field out.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationInfo, field_validator

from qat.engine.config import MAX_LOGPROBS, SamplingParams

COMPLETION_TOKENS = 16  # what OpenAI's /v1/completions generates where max_tokens is not given
MADE_OF = ("top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos")  # SamplingParams of the same name
ROLES = {"developer": "system"}  # OpenAI's newer word; chat templates know the older one


def _stop(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _prompts(value: Any) -> list[str | list[int]]:
    """One text, several, one list of token ids, or several, as a list of prompts."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value:
        if all(type(item) is int for item in value):
            return [value]
        if all(isinstance(item, str) for item in value):
            return value
        if all(isinstance(item, list) and all(type(token) is int for token in item) for item in value):
            return value
    raise ValueError("expected a text, a list of texts, a list of token ids, or a list of such lists; not empty")


def _content(value: Any) -> str:
    """The text of a message, whose parts are joined."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value:
        texts = [part.get("text") for part in value if isinstance(part, dict) and part.keys() == {"type", "text"}]
        types = {part["type"] for part in value if isinstance(part, dict) and "type" in part}
        if len(texts) == len(value) and types == {"text"} and all(isinstance(text, str) for text in texts):
            return "".join(text for text in texts if text)
    raise ValueError('expected a text, or a list of {"type": "text", "text": ...} parts; other kinds are not served')


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(extra="forbid", strict=True)

    include_usage: bool = False


class Message(BaseModel):
    """A turn of a conversation. What an answer of this API holds beside its text may come back, as it was: null."""

    model_config = ConfigDict(extra="forbid", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, PlainValidator(_content)]
    name: str | None = None
    refusal: None = None
    annotations: None = None
    audio: None = None
    function_call: None = None
    tool_calls: None = None

    def rendered(self) -> dict[str, str]:
        """The message as a chat template takes it."""
        named = {} if self.name is None else {"name": self.name}
        return {"role": ROLES.get(self.role, self.role), "content": self.content} | named


class Asked(BaseModel):
    """What both kinds of request have."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: str
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: Annotated[list[str] | None, BeforeValidator(_stop)] = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    n: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    user: str | None = None  # a name in the client's books; nothing depends on it

    @field_validator("n")
    @classmethod
    def _one(cls, value: int | None) -> int | None:
        if value not in (None, 1):
            raise ValueError(f"{value} answers to one prompt are not served; ask {value} times, or send n=1")
        return value

    @field_validator("frequency_penalty", "presence_penalty")
    @classmethod
    def _none(cls, value: float | None) -> float | None:
        if value:
            raise ValueError(f"a penalty of {value} is not served; send 0 or leave it out")
        return value

    @field_validator("stream_options")
    @classmethod
    def _streams(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise ValueError("has a meaning with stream=true only")
        return value

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk of usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def _params(self, max_tokens: int, logprobs: int | None) -> SamplingParams:
        given = {name: getattr(self, name) for name in MADE_OF if getattr(self, name) is not None}
        temperature = 1.0 if self.temperature is None else self.temperature
        return SamplingParams(max_tokens=max_tokens, temperature=temperature, logprobs=logprobs, **given)


class CompletionRequest(Asked):
    """POST /v1/completions."""

    prompt: Annotated[list[str | list[int]], PlainValidator(_prompts)]
    logprobs: int | None = None
    echo: bool | None = None

    @field_validator("echo")
    @classmethod
    def _no_echo(cls, value: bool | None) -> bool | None:
        if value:
            raise ValueError("the prompt is not repeated in the answer; send false or leave it out")
        return value

    def params(self, longest: int) -> SamplingParams:
        """How to sample.

        Args:
            longest: Not used: a completion is short where no length is asked for, whatever the model could do.

        Raises:
            ValueError: A value that means nothing; the message begins with the field.
        """
        return self._params(self.max_tokens or min(COMPLETION_TOKENS, longest), self.logprobs)


class ChatRequest(Asked):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @field_validator("max_completion_tokens")
    @classmethod
    def _agree(cls, value: int | None, info: ValidationInfo) -> int | None:
        other = info.data.get("max_tokens")
        if value is not None and other not in (None, value):
            raise ValueError(f"{value}, and max_tokens={other}: two words for one number; send one of them")
        return value

    @field_validator("top_logprobs")
    @classmethod
    def _asked_for(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise ValueError("has a meaning with logprobs=true only")
        return value

    def params(self, longest: int) -> SamplingParams:
        """How to sample.

        Args:
            longest: Tokens to generate at most where no length is asked for.

        Raises:
            ValueError: A value that means nothing; the message begins with the field.
        """
        logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._params(self.max_completion_tokens or self.max_tokens or longest, logprobs)
