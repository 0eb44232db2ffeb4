"""Detokenizer: the text of one request as its tokens come. Knows nothing of the engine."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\ufffd"  # what decoders put where bytes are not, or not yet, a character
CONTEXT, WINDOW = 6, 24  # tokens kept for context, tokens decoded at most (a character has four bytes)


class Detokenizer:
    """Turns tokens into text piece by piece.

    A piece is given out once nothing that follows can change it: bytes of a character are held back until it is whole,
    and the beginning of a stop string until it is clear that it is none. Tokens are decoded together with a few before
    them, since many tokenizers write a word differently at the beginning of a text.

    Args:
        decode: Text of token ids.
        stop: Strings that end the text.
        prompt: Tokens before the first one.
    """

    def __init__(self, decode: Callable[[list[int]], str], stop: Sequence[str] = (), prompt: Sequence[int] = ()):
        self.stopped = False
        self._decode, self._stop = decode, tuple(stop)
        self._tokens = list(prompt[-CONTEXT:])
        self._done = len(_whole(decode(self._tokens))) if self._tokens else 0
        self._held = ""

    def add(self, token: int) -> str:
        """The text that a token makes certain, often its own. Sets `stopped` once a stop string is complete."""
        assert not self.stopped
        self._tokens.append(token)
        text = self._decode(self._tokens)
        whole = _whole(text)
        piece, self._done = whole[self._done :], max(self._done, len(whole))
        if whole == text and len(self._tokens) >= WINDOW:
            self._tokens = self._tokens[-CONTEXT:]
            self._done = len(_whole(self._decode(self._tokens)))
        return self._release(piece)

    def finish(self) -> str:
        """What was still held back, when no token follows: a broken character becomes U+FFFD."""
        if self.stopped:
            return ""
        piece = self._release(self._decode(self._tokens)[self._done :]) if self._tokens else ""
        held, self._held = self._held, ""
        return piece if self.stopped else piece + held

    def _release(self, piece: str) -> str:
        """Gives out held text and piece, up to a stop string or to what may become one."""
        text, self._held = self._held + piece, ""
        ends = [place for place in map(text.find, self._stop) if place >= 0]
        if ends:
            self.stopped = True
            return text[: min(ends)]
        longest = max(map(len, self._stop), default=1) - 1
        for place in range(max(0, len(text) - longest), len(text)):
            if any(stop.startswith(text[place:]) for stop in self._stop):
                self._held = text[place:]
                return text[:place]
        return text


def _whole(text: str) -> str:
    """Text without the unfinished character at its end, if there is one."""
    return text.rstrip(REPLACEMENT)
