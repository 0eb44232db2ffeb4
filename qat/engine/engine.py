"""Engine: requests in, tokens out, one step at a time. Knows only token ids; text is `llm.py`'s.

Every method may be called from any thread; one lock makes a step, an abort and an arrival follow one another. What one
request asks for never disturbs another: what is wrong with it is refused when it arrives, and what goes wrong with it
later ends it alone.
"""

import threading
from collections import Counter
from collections.abc import Sequence as Sequences
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from qat.engine import sampler
from qat.engine.block_manager import BlockManager
from qat.engine.config import EngineConfig, SamplingParams
from qat.engine.sampler import Sampled
from qat.engine.scheduler import Chunk, Scheduler
from qat.engine.sequence import Sequence


class Runner(Protocol):
    """What the engine needs of a model."""

    def forward(self, chunks: Sequences[Chunk]) -> Tensor:
        """Computes the chunks, writes their keys and values, and returns hidden states `[tokens, H]`."""

    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits `[n, V]` of hidden states `[n, H]`."""


class Event(NamedTuple):
    """What a step did for one request.

    Attributes:
        id: The request.
        token: The token that it got; None if it ended without one.
        finish_reason: None while it goes on; `stop`: an end or stop token, which `token` is; `length`: `max_tokens`,
            the model's length or the pool's; `error`: see `message`.
        logprob: Log-probability of the token, if asked for.
        top: The likeliest tokens with theirs, if asked for.
        message: What went wrong.
    """

    id: int
    token: int | None
    finish_reason: str | None = None
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()
    message: str = ""


class Engine:
    """Continuous batching over a paged cache.

    Args:
        runner: The model.
        config: Sizes of a step and a block.
        num_blocks: Blocks that the runner's cache has.
        max_model_len: Tokens of prompt and output together.
        vocab_size: Tokens that the model knows.
        eos_token_ids: Tokens that end an output.
    """

    def __init__(
        self,
        runner: Runner,
        config: EngineConfig,
        num_blocks: int,
        max_model_len: int,
        vocab_size: int,
        eos_token_ids: Sequences[int] = (),
    ):
        self.runner, self.max_model_len, self.vocab_size = runner, max_model_len, vocab_size
        self.eos_token_ids = frozenset(eos_token_ids)
        self.blocks = BlockManager(num_blocks, config.block_size)
        self.scheduler = Scheduler(self.blocks, config.max_num_seqs, config.max_num_batched_tokens)
        self._sequences: dict[int, Sequence] = {}  # all that have not ended
        self._next_id = 0
        self._counts: Counter[str] = Counter()
        self.lock = threading.RLock()

    def add_request(self, prompt: Sequences[int], params: SamplingParams) -> int:
        """Queues a request and returns its id, which is new in every case.

        Raises:
            ValueError: The prompt or the parameters are nothing that this model can serve; nothing is queued.
        """
        tokens = self.check(prompt, params)
        with self.lock:
            # The last token is never computed, so a sequence can be one token longer than the pool.
            max_len = min(len(tokens) + params.max_tokens, self.max_model_len, self.blocks.num_tokens + 1)
            sequence = Sequence(self._next_id, tokens, params, max_len)
            self._next_id += 1
            self._sequences[sequence.id] = sequence
            self.scheduler.add(sequence)
            return sequence.id

    def check(self, prompt: Sequences[int], params: SamplingParams) -> tuple[int, ...]:
        """The prompt as a tuple, if it and its parameters can be served; what `add_request` would raise, if not."""
        tokens = self._check_tokens(prompt)
        if len(tokens) >= self.max_model_len or len(tokens) > self.blocks.num_tokens:
            raise ValueError(
                f"prompt of {len(tokens)} tokens: with at least one more it must fit the model length of "
                f"{self.max_model_len} tokens, and itself the pool of {self.blocks.num_tokens} tokens "
                f"({self.blocks.num_blocks} blocks of {self.blocks.block_size})"
            )
        params.check(self.vocab_size)
        return tokens

    def abort(self, id: int) -> bool:
        """Ends a request at once, wherever it is, and frees its blocks; it gets no further event.

        Returns:
            Whether there was something to end: aborting twice, or what has ended, does nothing.
        """
        with self.lock:
            return self._finish(id, "abort")

    def step(self) -> list[Event]:
        """Computes one batch, and returns an event for each request that got a token or ended."""
        with self.lock:
            chunks = self.scheduler.schedule()
            assert chunks or not self._sequences, "requests, but none of them can progress"
            if not chunks:
                return []
            self._counts["steps"] += 1
            try:
                yielding, sampled = self._compute(chunks)
            except torch.OutOfMemoryError as error:
                return [self._fail(chunk.sequence, f"out of memory: {error}") for chunk in chunks]
            for chunk in chunks:
                chunk.sequence.num_computed = chunk.stop
            self._counts["computed_tokens"] += sum(chunk.stop - chunk.start for chunk in chunks)
            return [self._advance(*pair) for pair in zip(yielding, sampled, strict=True)]

    def has_unfinished(self) -> bool:
        """Whether a step would have anything to do."""
        return bool(self._sequences)

    def score(self, texts: Sequences[Sequences[int]], prefill: Sequences[int] | None = None) -> list[Tensor]:
        """Logits after every token of some texts, through the cache and in one batch, as in generation.

        Args:
            texts: Token ids of each.
            prefill: How many tokens of each are computed as a prompt is, in chunks; the others are fed one by one, as
                when decoding. None: all of them.

        Returns:
            fp32 `[len(text), V]` for each text, on the CPU.

        Raises:
            ValueError: A text does not fit the model, or all together do not fit the blocks that are free now.
        """
        checked = [self._check_tokens(text) for text in texts]
        prompts = [len(text) for text in checked] if prefill is None else list(prefill)
        for text, prompt in zip(checked, prompts, strict=True):
            if not 0 <= prompt <= len(text):
                raise ValueError(f"prefill={prompt}: expected a number of tokens from 0 to {len(text)}, or None")
            if len(text) > self.max_model_len:
                raise ValueError(f"{len(text)} tokens: they must fit the model length of {self.max_model_len} tokens")
        with self.lock:
            size = self.blocks.block_size
            if (needed := sum(-(-len(text) // size) for text in checked)) > self.blocks.num_free:
                raise ValueError(
                    f"the texts take {needed} blocks of {size} tokens, and {self.blocks.num_free} are free"
                )
            sequences = [Sequence(-1, text, SamplingParams(), len(text)) for text in checked]
            rows: list[list[Tensor]] = [[] for _ in checked]
            try:
                while chunks := self._score_chunks(sequences, prompts):
                    logits = self.runner.logits(self.runner.forward(list(chunks.values()))).cpu()
                    parts = logits.split([chunk.stop - chunk.start for chunk in chunks.values()])
                    for (index, chunk), part in zip(chunks.items(), parts, strict=True):
                        rows[index].append(part)
                        chunk.sequence.num_computed = chunk.stop
            finally:
                for sequence in sequences:
                    self.blocks.free(sequence)
            return [torch.cat(parts) for parts in rows]

    def _score_chunks(self, sequences: list[Sequence], prompts: list[int]) -> dict[int, Chunk]:
        """The next tokens of each text that is not done, as many as a step takes; their blocks are allocated."""
        chunks, budget = {}, self.scheduler.max_num_batched_tokens
        for index, (sequence, prompt) in enumerate(zip(sequences, prompts, strict=True)):
            start = sequence.num_computed
            stop = min(max(start + 1, prompt), start + budget, len(sequence))
            if stop > start:
                self.blocks.allocate(sequence, stop)
                chunks[index] = Chunk(sequence, start, stop)
                budget -= stop - start
        return chunks

    def stats(self) -> dict[str, Any]:
        """Counts since the start (`steps`, `generated_tokens`, ...) and now (`running`, `free_blocks`, ...)."""
        with self.lock:
            now = {
                "running": len(self.scheduler.running),
                "waiting": len(self.scheduler.waiting),
                "blocks": self.blocks.num_blocks,
                "free_blocks": self.blocks.num_free,
                "requests": self._next_id,
                "preemptions": self.scheduler.num_preemptions,
            }
            counted = ("steps", "computed_tokens", "generated_tokens", "stop", "length", "abort", "error")
            return now | {name: self._counts[name] for name in counted}

    def check_integrity(self) -> None:
        """Asserts that no block is lost, shared by mistake or held for nothing, and no request forgotten."""
        with self.lock:
            queued = [*self.scheduler.running, *self.scheduler.waiting]
            assert sorted(s.id for s in queued) == sorted(self._sequences), "a request is lost, or queued twice"
            assert [s.id for s in queued] == sorted(s.id for s in queued), "a request runs before an older one"
            self.blocks.check_integrity(queued)

    def _check_tokens(self, tokens: Sequences[int]) -> tuple[int, ...]:
        if len(tokens) == 0:
            raise ValueError("prompt: empty; expected at least one token")
        for token in tokens:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < self.vocab_size:
                raise ValueError(f"prompt: {token!r} is not a token id of a vocabulary of {self.vocab_size}")
        return tuple(tokens)

    def _compute(self, chunks: list[Chunk]) -> tuple[list[Sequence], list[Sampled | None]]:
        """Runs a batch: the sequences whose chunk reaches their end, and what each of them gets."""
        hidden = self.runner.forward(chunks)
        yielding, ends, place = [], [], 0
        for chunk in chunks:
            place += chunk.stop - chunk.start
            if chunk.yields:
                yielding.append(chunk.sequence)
                ends.append(place - 1)
        if not ends:
            return [], []
        logits = self.runner.logits(hidden[torch.tensor(ends, device=hidden.device)])
        return yielding, sampler.sample(logits, yielding)

    def _advance(self, sequence: Sequence, sampled: Sampled | None) -> Event:
        """Gives a sequence its next token, and ends it where that is due."""
        if sampled is None:
            return self._fail(sequence, f"the logits at position {len(sequence)} are not finite")
        sequence.output.append(sampled.token)
        self._counts["generated_tokens"] += 1
        params, reason = sequence.params, None
        if sampled.token in params.stop_token_ids or (not params.ignore_eos and sampled.token in self.eos_token_ids):
            reason = "stop"
        elif len(sequence) >= sequence.max_len:
            reason = "length"
        if reason:
            self._finish(sequence.id, reason)
        return Event(sequence.id, sampled.token, reason, sampled.logprob, sampled.top)

    def _fail(self, sequence: Sequence, message: str) -> Event:
        self._finish(sequence.id, "error")
        return Event(sequence.id, None, "error", message=message)

    def _finish(self, id: int, reason: str) -> bool:
        sequence = self._sequences.pop(id, None)
        if sequence is not None:
            self.scheduler.remove(sequence)
            self._counts[reason] += 1
        return sequence is not None
