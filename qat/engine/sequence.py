"""Sequence: one request on its way through the engine. Knows only token ids."""

import secrets
from dataclasses import dataclass, field

from qat.engine.config import SamplingParams


@dataclass(eq=False)
class Sequence:
    """A prompt, what has been generated after it, and how much of both is in the cache.

        tokens  |-------------- prompt --------------|------ output ------|
        cache   |------- num_computed -------|                                 KV of these is written
        step                                 |---- chunk ----|                 what the next step computes

    A step whose chunk reaches the end of `tokens` yields the next token. A sequence that decodes has all but its last
    token in the cache.

    Attributes:
        id: Number of the request, in the order of arrival: the lower, the older.
        prompt: Its tokens.
        params: How it is sampled.
        max_len: Tokens at which it ends, prompt included.
        output: Tokens generated.
        block_table: Blocks that it holds, in the order of its tokens.
        num_computed: Tokens whose keys and values are in the cache.
        num_preemptions: How often its blocks were taken away.
        seed: Seed of its draws.
    """

    id: int
    prompt: tuple[int, ...]
    params: SamplingParams
    max_len: int
    output: list[int] = field(default_factory=list)
    block_table: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_preemptions: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        # An entropy source of its own: draws must not depend on what else the process draws.
        self.seed = secrets.randbits(63) if self.params.seed is None else self.params.seed

    def __len__(self) -> int:
        return len(self.prompt) + len(self.output)

    @property
    def num_uncomputed(self) -> int:
        """Tokens that are not in the cache yet: 1 while decoding."""
        return len(self) - self.num_computed

    @property
    def draws(self) -> bool:
        """Whether its next token is drawn, not the likeliest."""
        return self.params.temperature > 0 and len(self.output) >= self.params.greedy_tokens

    def tokens(self, start: int, stop: int) -> list[int]:
        """Tokens `[start, stop)`."""
        edge = len(self.prompt)
        if start >= edge:
            return self.output[start - edge : stop - edge]
        return [*self.prompt[start:stop], *self.output[max(0, start - edge) : max(0, stop - edge)]]
