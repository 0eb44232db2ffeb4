"""What can be asked of the engine: how it runs, and how one request is sampled. Torch-free, and checked here."""

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from qat.numerics.kv import KINDS

DTYPES = ("auto", "float32", "bfloat16", "float16", "float64")
KERNELS = ("auto", "reference")
CACHES = ("auto", "none", *KINDS)
MAX_LOGPROBS = 20
FLOAT_MAX = sys.float_info.max  # NaN, infinities and integers beyond any float fail against it


def _integer(name: str, value: object, low: int, high: float = math.inf) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        limit = f"at least {low}" if high == math.inf else f"from {low} to {high}"
        raise ValueError(f"{name}={value!r}: expected an integer {limit}")


def _number(name: str, value: float, low: float, high: float, expected: str, open_low: bool = False) -> None:
    valid = not isinstance(value, bool) and isinstance(value, int | float) and abs(value) <= FLOAT_MAX
    if not valid or not low <= value <= high or (open_low and value == low):
        raise ValueError(f"{name}={value!r}: expected {expected}")


@dataclass(frozen=True)
class EngineConfig:
    """How the engine runs.

    Attributes:
        block_size: Tokens in a block of the cache.
        num_blocks: Blocks in the pool; None: as many as `kv_memory_gib` holds, and no more than could ever be used.
        kv_memory_gib: Memory for the pool in GiB, where `num_blocks` is None.
        max_num_seqs: Sequences that run at a time.
        max_num_batched_tokens: Tokens in one step; longer prompts are prefilled in chunks.
        max_model_len: Tokens of prompt and output together; None: what the model was built for.
        device: `auto` (CUDA where there is one), `cpu`, `cuda` or `cuda:N`.
        dtype: Of activations and cache; `auto`: float32 on a CPU, the checkpoint's storage dtype on a GPU. `float64`
            is for proofs, and runs on the reference kernels only.
        kernel: `auto`: the fastest that fits; `reference`: fp32 everywhere and the reference kernels.
        kv: What the cache holds: `auto`: as the checkpoint was made for; `none`: vectors in `dtype`; `int8`, `int4` or
            `fp8`: codes, with a scale for each token and head.

    Raises:
        ValueError: A value that means nothing; the message names the field.
    """

    block_size: int = 32
    num_blocks: int | None = None
    kv_memory_gib: float = 0.5
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_model_len: int | None = None
    device: str = "auto"
    dtype: str = "auto"
    kernel: str = "auto"
    kv: str = "auto"

    def __post_init__(self) -> None:
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens"):
            _integer(name, getattr(self, name), 1)
        if self.num_blocks is not None:
            _integer("num_blocks", self.num_blocks, 1)
        if self.max_model_len is not None:
            _integer("max_model_len", self.max_model_len, 2)
        _number("kv_memory_gib", self.kv_memory_gib, 0, 2**20, "a positive number of GiB", open_low=True)
        if not isinstance(self.device, str) or not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise ValueError(f"device={self.device!r}: expected auto, cpu, cuda or cuda:N")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: expected one of {', '.join(DTYPES)}")
        if self.kernel not in KERNELS:
            raise ValueError(f"kernel={self.kernel!r}: expected one of {', '.join(KERNELS)}")
        if self.kernel == "reference" and self.dtype not in ("auto", "float32", "float64"):
            raise ValueError(f"dtype={self.dtype!r}: the reference kernels run in float32; use dtype=auto")
        if self.kernel != "reference" and self.dtype == "float64":
            raise ValueError("dtype='float64': only the reference kernels run in it; use kernel=reference")
        if self.kv not in CACHES:
            raise ValueError(f"kv={self.kv!r}: expected one of {', '.join(CACHES)}")


@dataclass(frozen=True)
class SamplingParams:
    """How one request is sampled, and when it ends.

    Filters apply in this order: temperature, `top_k`, `top_p` (of what top_k left), `min_p`. Tokens that tie with the
    last one kept are kept too.

    Attributes:
        max_tokens: Tokens to generate at most.
        temperature: 0 is greedy, and then nothing below applies but the ends.
        greedy_tokens: The output begins with so many greedy tokens before any is drawn.
        top_k: Keep the k likeliest tokens; -1: all.
        top_p: Keep the likeliest tokens that together reach this probability.
        min_p: Keep tokens at least this likely, relative to the likeliest.
        seed: Draws are a function of (seed, position), whatever runs beside; None: drawn anew for each request.
        stop: Strings that end the text; they are not part of it.
        stop_token_ids: Tokens that end the output; they are its last token but not part of the text.
        logprobs: Report the log-probability of each token, and of this many likeliest ones beside it; None: nothing.
        ignore_eos: Go on past the model's end-of-sequence tokens.

    Raises:
        ValueError: A value that means nothing; the message names the field.
    """

    max_tokens: int = 256
    temperature: float = 0.0
    greedy_tokens: int = 0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _integer("max_tokens", self.max_tokens, 1)
        _number("temperature", self.temperature, 0, math.inf, "a finite number, 0 (greedy) or more")
        _integer("greedy_tokens", self.greedy_tokens, 0)
        _integer("top_k", self.top_k, -1)
        if self.top_k == 0:
            raise ValueError("top_k=0: expected -1 (all tokens) or a positive number of tokens")
        _number("top_p", self.top_p, 0, 1, "a probability above 0, up to 1", open_low=True)
        _number("min_p", self.min_p, 0, 1, "a probability from 0 to 1")
        if self.seed is not None:
            _integer("seed", self.seed, -(2**63), 2**63 - 1)
        if isinstance(self.stop, str) or not isinstance(self.stop, Sequence):
            raise ValueError(f"stop={self.stop!r}: expected a list of strings")
        for string in self.stop:
            if not isinstance(string, str) or not string:
                raise ValueError(f"stop: {string!r} is not a string of one character or more")
        if not isinstance(self.stop_token_ids, Sequence):
            raise ValueError(f"stop_token_ids={self.stop_token_ids!r}: expected a list of token ids")
        for token in self.stop_token_ids:
            _integer("stop_token_ids", token, 0)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if not isinstance(self.ignore_eos, bool):
            raise ValueError(f"ignore_eos={self.ignore_eos!r}: expected true or false")

    def check(self, vocab_size: int) -> None:
        """Raises ValueError if the parameters do not fit a model of this vocabulary."""
        for token in self.stop_token_ids:
            if token >= vocab_size:
                raise ValueError(f"stop_token_ids: {token} is outside the vocabulary of {vocab_size} tokens")
        if self.logprobs is not None and self.logprobs > vocab_size:
            raise ValueError(f"logprobs={self.logprobs}: the vocabulary has {vocab_size} tokens")
