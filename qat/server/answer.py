"""The JSON of answers, whole and in pieces, for both kinds of request. Knows nothing of HTTP."""

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from qat.engine.llm import Delta


@dataclass(frozen=True)
class Answer:
    """How one request is answered.

    Attributes:
        chat: Whether it came to /v1/chat/completions.
        model: The served model's name.
        logprobs: Whether log-probabilities were asked for.
        piece: Text of one token by itself.
        id: Of the answer.
        created: In seconds since 1970.
    """

    chat: bool
    model: str
    logprobs: bool
    piece: Callable[[int], str]
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, num_prompt_tokens: int, outputs: Sequence[Sequence[Delta]]) -> dict[str, Any]:
        """The answer in one piece: a choice for each prompt, made of all its deltas."""
        choices = []
        for index, deltas in enumerate(outputs):
            text = "".join(delta.text for delta in deltas)
            message = {"message": {"role": "assistant", "content": text, "refusal": None}}
            choices.append(self._choice(index, message if self.chat else {"text": text}, deltas, 0))
        new = sum(len(delta.token_ids) for deltas in outputs for delta in deltas)
        return self._envelope(choices, chunk=False) | {"usage": usage(num_prompt_tokens, new)}

    def opening(self) -> dict[str, Any]:
        """What a chat's stream begins with: who speaks."""
        return self._envelope([self._choice(0, {"delta": {"role": "assistant", "content": ""}}, [], 0)], chunk=True)

    def chunk(self, index: int, delta: Delta, offset: int) -> dict[str, Any]:
        """A piece of a stream.

        Args:
            index: Which prompt it belongs to.
            delta: What became certain.
            offset: Characters of that prompt's output before it.
        """
        content = {"delta": {"content": delta.text} if delta.text else {}} if self.chat else {"text": delta.text}
        return self._envelope([self._choice(index, content, [delta], offset)], chunk=True)

    def closing(self, num_prompt_tokens: int, new: int) -> dict[str, Any]:
        """The usage at the end of a stream."""
        return self._envelope([], chunk=True) | {"usage": usage(num_prompt_tokens, new)}

    def _envelope(self, choices: list[dict[str, Any]], chunk: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if chunk else "chat.completion") if self.chat else "text_completion"
        id = f"{'chatcmpl' if self.chat else 'cmpl'}-{self.id}"
        return {"id": id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _choice(self, index: int, content: dict[str, Any], deltas: Sequence[Delta], offset: int) -> dict[str, Any]:
        form = self._chat_logprobs if self.chat else self._text_logprobs
        logprobs = form(deltas, offset) if self.logprobs and deltas else None
        reason = deltas[-1].finish_reason if deltas else None
        return {"index": index, **content, "logprobs": logprobs, "finish_reason": reason}

    def _chat_logprobs(self, deltas: Sequence[Delta], offset: int) -> dict[str, Any]:
        content = [
            self._scored(token, logprob) | {"top_logprobs": [self._scored(*pair) for pair in top]}
            for delta in deltas
            for token, logprob, top in zip(delta.token_ids, delta.logprobs, delta.top_logprobs, strict=True)
        ]
        return {"content": content, "refusal": None}

    def _scored(self, token: int, logprob: float) -> dict[str, Any]:
        text = self.piece(token)
        whole = "\ufffd" not in text  # a part of a character has bytes that its text does not tell
        return {"token": text, "logprob": logprob, "bytes": list(text.encode()) if whole else None}

    def _text_logprobs(self, deltas: Sequence[Delta], offset: int) -> dict[str, Any]:
        """Four lists, one entry for each token; an offset counts the characters that were certain before the token."""
        offsets, tops = [], []
        for delta in deltas:
            offsets += [offset] * len(delta.token_ids)
            offset += len(delta.text)
            for top in delta.top_logprobs:
                # Likeliest last, so that it stays where tokens have the same text.
                tops.append({self.piece(token): logprob for token, logprob in reversed(top)})
        return {
            "tokens": [self.piece(token) for delta in deltas for token in delta.token_ids],
            "token_logprobs": [logprob for delta in deltas for logprob in delta.logprobs],
            "top_logprobs": tops,
            "text_offset": offsets,
        }


def usage(num_prompt_tokens: int, new: int) -> dict[str, int]:
    """Tokens read and written."""
    return {
        "prompt_tokens": num_prompt_tokens,
        "completion_tokens": new,
        "total_tokens": num_prompt_tokens + new,
    }
