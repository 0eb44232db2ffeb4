"""qat chat: a checkpoint in the terminal, or at the end of a pipe."""

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, TextIO

from qat.cli.serve import open_llm
from qat.engine.config import SamplingParams
from qat.engine.llm import LLM

COMMANDS = "/reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer"


def main(config: dict[str, Any]) -> int:
    """Answers line by line, until /exit or the end of the input."""
    llm = open_llm(config)
    chat = Chat(llm, SamplingParams(**config["sampling"]), sys.stdout, sys.stderr)
    chat.fit([{"role": "user", "content": "?"}])  # a checkpoint that cannot chat says so at once
    shown = sys.stdin.isatty()
    if shown:
        chat.note(f"{llm.path}: {COMMANDS}")
    for line in lines(shown):
        if line == "/exit":
            break
        if line == "/reset":
            chat.turns.clear()
            chat.note("the conversation is forgotten")
        elif line.startswith("/"):
            chat.note(f"no command {line.split()[0]}: {COMMANDS}")
        elif line:
            chat.say(line)
    llm.check_integrity()
    return 0


def lines(shown: bool) -> Iterator[str]:
    """Lines of the input, stripped, with a prompt before each if one is to be shown; Ctrl-C drops a line."""
    while True:
        try:
            yield input("> " if shown else "").strip()
        except EOFError:
            if shown:
                print()
            return
        except KeyboardInterrupt:
            if not shown:
                raise
            print()


class Chat:
    """A conversation with a model.

    Args:
        llm: The model.
        params: How it answers.
        out: Where answers go.
        notes: Where everything else goes.
    """

    def __init__(self, llm: LLM, params: SamplingParams, out: TextIO, notes: TextIO):
        self.llm, self.params, self.out, self.notes = llm, params, out, notes
        self.turns: list[dict[str, str]] = []  # user and assistant in turn

    def say(self, text: str) -> None:
        """Takes the user's turn, and writes the model's as it comes; an interrupt ends it and keeps what was said."""
        asked = {"role": "user", "content": text}
        try:
            prompt, dropped = self.fit([*self.turns, asked])
        except ValueError as error:
            self.note(str(error))
            return
        if dropped:
            count = f"{dropped} oldest turns" if dropped > 1 else "oldest turn"
            self.note(f"the {count} no longer fit and are forgotten")
            del self.turns[:dropped]
        answer, message = "", ""
        with interrupts() as interrupted:
            for delta in self.llm.stream(prompt, self.params):
                answer, message = answer + delta.text, delta.message
                self.out.write(delta.text)
                self.out.flush()
                if interrupted:
                    break
        self.out.write("\n")
        self.out.flush()
        if message:
            self.note(f"the answer failed: {message}")
            return
        self.turns += [asked, {"role": "assistant", "content": answer}]

    def fit(self, turns: Sequence[dict[str, str]]) -> tuple[list[int], int]:
        """Tokens of a conversation that leave room for an answer, and how many of its oldest turns had to go.

        Room is `max_tokens`, or half of what the model can hold if that is less. The last turn stays in any case.

        Raises:
            ValueError: It does not fit even alone, or the chat template refuses it.
        """
        engine = self.llm.engine
        length = min(engine.max_model_len, engine.blocks.num_tokens + 1)
        room = min(self.params.max_tokens, length // 2)
        for dropped in range(0, len(turns), 2):
            prompt = self.llm.encode_chat(turns[dropped:])
            if len(prompt) + room <= length:
                break
        engine.check(prompt, self.params)
        return prompt, dropped

    def note(self, text: str) -> None:
        """Says something that is no answer."""
        print(f"[{text}]", file=self.notes, flush=True)


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Collects the first Ctrl-C instead of raising it, so that it comes between two steps of the engine, not within."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if seen:
            raise KeyboardInterrupt
        seen.append(number)

    before = signal.signal(signal.SIGINT, note)
    try:
        yield seen
    finally:
        signal.signal(signal.SIGINT, before)
