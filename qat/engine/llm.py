"""LLM: text in, text out. Tokenizer and detokenizer around the engine; what a script or a server holds."""

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as Sequences
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from qat.engine.config import EngineConfig, SamplingParams
from qat.engine.detokenizer import Detokenizer
from qat.engine.engine import Engine, Event
from qat.engine.loader import load
from qat.engine.model_runner import ModelRunner
from qat.formats.base import read_json
from qat.nn.packed_linear import PackedLinear

Prompt = str | Sequences[int]
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")


@dataclass(frozen=True)
class Delta:
    """What became certain of one request's output in one step.

    Attributes:
        id: The request.
        text: New text; may be empty while a character or a stop string is incomplete.
        token_ids: New tokens.
        finish_reason: None while it goes on, else `stop`, `length` or `error`.
        logprobs: Log-probability of each new token, if asked for.
        top_logprobs: The likeliest tokens with theirs at each new token, if asked for.
        message: What went wrong.
    """

    id: int
    text: str
    token_ids: tuple[int, ...] = ()
    finish_reason: str | None = None
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[tuple[tuple[int, float], ...], ...] = ()
    message: str = ""


@dataclass
class Completion:
    """The whole output of one request; its attributes are those of `Delta`, put together."""

    prompt_token_ids: tuple[int, ...]
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[tuple[tuple[int, float], ...]] = field(default_factory=list)
    message: str = ""

    def extend(self, delta: Delta) -> None:
        """Appends what became certain."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs
        self.top_logprobs += delta.top_logprobs
        self.finish_reason, self.message = delta.finish_reason, delta.message


class LLM:
    """A model that is being served.

    `generate`, `stream` and `chat` drive the engine themselves. A server drives it instead through `submit`, `step` and
    `abort`; do not mix the two.

    Args:
        path: A checkpoint directory, plain or compressed-tensors.
        config: How the engine runs.

    Raises:
        ValueError: The checkpoint or the configuration cannot be served; the message says what and where.
    """

    def __init__(self, path: Path | str, config: EngineConfig | None = None):
        self.path, self.config = Path(path), config or EngineConfig()
        self.loaded = load(self.path, self.config)
        runner = ModelRunner(self.loaded, self.config)
        self._tokenizer = self._open_tokenizer()
        sizes = (runner.num_blocks, self.loaded.max_model_len, self.loaded.config.vocab_size)
        self.engine = Engine(runner, self.config, *sizes, sorted(self._eos_token_ids()))
        self._texts: dict[int, Detokenizer] = {}
        self._inbox: defaultdict[int, deque[Delta]] = defaultdict(deque)  # of requests driven from here

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The checkpoint's tokenizer.

        Raises:
            ValueError: The directory holds none.
        """
        if self._tokenizer is None:
            raise ValueError(f"{self.path}: holds no tokenizer; prompts must be token ids, and stop must be empty")
        return self._tokenizer

    @property
    def kernels(self) -> dict[str, int]:
        """How many packed weights lie in the layout of each kernel; a tied pair is one."""
        linears = (m for m in self.loaded.model.modules() if isinstance(m, PackedLinear))
        return dict(Counter(type(linear.weight).__name__ for linear in linears))

    def generate(self, prompts: Sequences[Prompt], params: SamplingParams | None = None) -> list[Completion]:
        """Completes all prompts, batched as the engine finds room.

        Raises:
            ValueError: A prompt cannot be served; then none is.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts: a list of prompts, not one text; write generate([text])")
        params = params or SamplingParams()
        tokens = [self.encode(prompt) for prompt in prompts]
        for i, prompt in enumerate(tokens):
            try:
                self.engine.check(prompt, params)
            except ValueError as error:
                raise ValueError(f"prompts[{i}]: {error}") from None
        completions = {self.submit(prompt, params): Completion(tuple(prompt)) for prompt in tokens}
        for delta in self._drive(completions):
            completions[delta.id].extend(delta)
        return list(completions.values())

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Completes one prompt piece by piece; leaving the iterator ends the request."""
        tokens, params = self.encode(prompt), params or SamplingParams()
        self.engine.check(tokens, params)
        return self._stream(tokens, params)

    def chat(self, messages: Sequences[Mapping[str, str]], params: SamplingParams | None = None) -> Completion:
        """Answers a conversation of `{"role": ..., "content": ...}` messages."""
        return self.generate([self.encode_chat(messages)], params)[0]

    def score(self, texts: Sequences[Sequences[int]], prefill: Sequences[int] | None = None) -> list[Tensor]:
        """Logits after every token of some texts: see `Engine.score`."""
        return self.engine.score(texts, prefill)

    def submit(self, prompt: Prompt, params: SamplingParams) -> int:
        """Queues a request and returns its id.

        Raises:
            ValueError: It cannot be served; nothing is queued.
        """
        tokens = self.encode(prompt)
        if params.stop:
            assert self.tokenizer
        with self.engine.lock:
            id = self.engine.add_request(tokens, params)
            self._texts[id] = Detokenizer(self._decode, params.stop, tokens)
        return id

    def step(self) -> list[Delta]:
        """One step of the engine, as text. What fails for one request ends that request only."""
        with self.engine.lock:
            return [self._delta(event) for event in self.engine.step()]

    def abort(self, id: int) -> bool:
        """Ends a request; doing so twice, or after its end, does nothing."""
        with self.engine.lock:
            self._texts.pop(id, None)
            return self.engine.abort(id)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt; ids stay as they are.

        Raises:
            ValueError: The text cannot be encoded.
        """
        if not isinstance(prompt, str):
            return list(prompt)
        try:
            return self.tokenizer.encode(prompt)
        except (UnicodeError, TypeError) as error:
            raise ValueError(f"prompt: text that cannot be encoded ({error})") from None

    def encode_chat(self, messages: Sequences[Mapping[str, str]]) -> list[int]:
        """Token ids of a conversation, up to where the answer begins.

        Raises:
            ValueError: The checkpoint has no chat template, or the template refuses the messages.
        """
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
            return self.tokenizer.encode(text, add_special_tokens=False)
        except Exception as error:  # templates are programs: they may raise anything
            raise ValueError(f"messages: the chat template cannot render them ({error})") from None

    def check_integrity(self) -> None:
        """Asserts that the engine lost nothing, and that no text is kept of a request that has ended."""
        self.engine.check_integrity()
        assert len(self._texts) <= self.engine.stats()["running"] + self.engine.stats()["waiting"], "texts are left"

    def _stream(self, tokens: list[int], params: SamplingParams) -> Iterator[Delta]:
        yield from self._drive([self.submit(tokens, params)])

    def _drive(self, ids: Iterable[int]) -> Iterator[Delta]:
        """Steps until these requests have ended; what a step brings for others waits in their inbox."""
        open_ids = set(ids)
        try:
            while open_ids:
                ready = [delta for id in open_ids for delta in self._inbox.pop(id, ())]
                for delta in ready:
                    if delta.finish_reason:
                        open_ids.discard(delta.id)
                    yield delta
                if open_ids and not ready:
                    for delta in self.step():
                        self._inbox[delta.id].append(delta)
        finally:
            for id in open_ids:
                self.abort(id)
                self._inbox.pop(id, None)

    def _delta(self, event: Event) -> Delta:
        tokens = () if event.token is None else (event.token,)
        logprobs, top = ((event.logprob,), (event.top,)) if event.logprob is not None else ((), ())
        try:
            text, reason, message = self._text(event), event.finish_reason, event.message
            if self._texts[event.id].stopped:
                self.engine.abort(event.id)
                reason = "stop"
        except Exception as error:  # whatever a tokenizer throws is this request's failure alone
            self.engine.abort(event.id)
            text, reason, message = "", "error", f"its text could not be made ({type(error).__name__}: {error})"
        if reason:
            self._texts.pop(event.id, None)
        return Delta(event.id, text, tokens, reason, logprobs, top, message)

    def _text(self, event: Event) -> str:
        """Text of an event; a token that ends the output has none."""
        detokenizer = self._texts[event.id]
        text = "" if event.token is None or event.finish_reason == "stop" else detokenizer.add(event.token)
        return text + detokenizer.finish() if event.finish_reason else text

    def _decode(self, tokens: list[int]) -> str:
        if self._tokenizer is None:
            return ""
        text = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def _open_tokenizer(self) -> PreTrainedTokenizerBase | None:
        if not any((self.path / name).exists() for name in TOKENIZER_FILES):
            return None
        try:
            return AutoTokenizer.from_pretrained(self.path, local_files_only=True)
        except Exception as error:  # a damaged file fails in many ways
            raise ValueError(f"{self.path}: the tokenizer cannot be read ({error})") from None

    def _eos_token_ids(self) -> set[int]:
        """End tokens of generation_config.json (else config.json) and of the tokenizer."""
        file = self.path / "generation_config.json"
        generation = read_json(file) if file.exists() else {}
        eos = generation.get("eos_token_id", self.loaded.config.eos_token_id)
        given = eos if isinstance(eos, list) else [] if eos is None else [eos]
        if not all(type(id) is int for id in given):
            named = file if "eos_token_id" in generation else self.path / "config.json"
            raise ValueError(f"{named}: eos_token_id must be an integer or a list of them, found {eos!r}")
        ids = set(given)
        own = None if self._tokenizer is None else self._tokenizer.eos_token_id
        return ids if own is None else ids | {own}
