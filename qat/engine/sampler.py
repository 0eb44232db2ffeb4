"""Sampler: the next token of every sequence, from its row of logits. One row never influences another."""

import math
from collections.abc import Sequence as Sequences
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from qat.engine.config import SamplingParams
from qat.engine.sequence import Sequence

HEAD = 512  # top_p looks among this many tokens before it sorts the whole vocabulary
ROWS = 512  # rows that are filtered at once: in fp64 a row of a large vocabulary takes a megabyte


class Sampled(NamedTuple):
    """A token, and how likely the model found it.

    Attributes:
        token: Its id.
        logprob: Its log-probability under the raw fp32 logits, whatever the filters; None if not asked for.
        top: The likeliest tokens and their log-probabilities, likeliest first, as many as asked for.
    """

    token: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


def sample(logits: Tensor, sequences: Sequences[Sequence]) -> list[Sampled | None]:
    """The next token of each sequence; None where its logits are not finite.

    Args:
        logits: fp32 `[len(sequences), V]`.
        sequences: Whose they are; their parameters, seeds and lengths decide.
    """
    low, high = torch.aminmax(logits, dim=-1)  # NaN propagates into both
    finite = (torch.isfinite(low) & torch.isfinite(high)).tolist()
    tokens = logits.argmax(-1)
    drawn = [i for i, sequence in enumerate(sequences) if finite[i] and sequence.draws]
    for start in range(0, len(drawn), ROWS):
        rows = drawn[start : start + ROWS]
        chosen, index = [sequences[i] for i in rows], torch.tensor(rows, device=logits.device)
        u = uniforms([s.seed for s in chosen], [len(s) for s in chosen])
        tokens[index] = draw(filtered(logits[index], [s.params for s in chosen]), u.to(logits.device))
    result = [Sampled(token) if valid else None for token, valid in zip(tokens.tolist(), finite, strict=True)]
    for i, sequence in enumerate(sequences):
        if sequence.params.logprobs is not None and (sampled := result[i]):
            result[i] = _reported(sampled.token, logits[i], sequence.params.logprobs)
    return result


def filtered(rows: Tensor, params: Sequences[SamplingParams]) -> Tensor:
    """Probabilities `[n, V]` (fp64) after temperature, top_k, top_p and min_p: 0 where filtered, the rest not normed.

    Args:
        rows: Logits `[n, V]`.
        params: Those of each row, with temperatures above 0.
    """
    size = rows.shape[-1]

    def column(values: Sequences[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=rows.device)[:, None]

    wide = rows.double()
    scaled = (wide - wide.amax(-1, keepdim=True)) / column([p.temperature for p in params])
    top_k = [p.top_k if 0 < p.top_k < size else 0 for p in params]
    if any(top_k):
        ranked = scaled.topk(max(top_k)).values
        last = ranked.gather(-1, torch.tensor(top_k, device=rows.device)[:, None].sub(1).clamp(min=0))
        scaled.masked_fill_(scaled < last.masked_fill(column(top_k) == 0, -math.inf), -math.inf)
    probs = scaled.softmax(-1)
    if cut := [i for i, p in enumerate(params) if p.top_p < 1]:
        index = torch.tensor(cut, device=rows.device)
        least = torch.zeros(len(params), 1, dtype=torch.float64, device=rows.device)
        least[index] = _least(probs[index], column([params[i].top_p for i in cut]))
        probs.masked_fill_(probs < least, 0)
    if any(p.min_p > 0 for p in params):
        probs.masked_fill_(probs < column([p.min_p for p in params]) * probs.amax(-1, keepdim=True), 0)
    return probs


def draw(probs: Tensor, u: Tensor) -> Tensor:
    """The token of each row whose share of the summed probabilities `[n, V]` (fp64) holds u `[n]`, in [0, 1)."""
    heaped = probs.cumsum(-1)
    total = heaped[:, -1]
    # A token of probability 0 has no share: the first sum beyond the target always belongs to one that has.
    target = torch.minimum(u * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(heaped, target[:, None], right=True)[:, 0]


def uniforms(seeds: Sequences[int], positions: Sequences[int]) -> Tensor:
    """Numbers in [0, 1), fp64 `[n]`: each a pure function of its seed and position (two rounds of splitmix64)."""
    steps = np.asarray(positions, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed = _mix(_mix(np.asarray(seeds, dtype=np.int64).view(np.uint64)) ^ steps)
    return torch.from_numpy((mixed >> np.uint64(11)) * 2.0**-53)


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)


def _least(probs: Tensor, top_p: Tensor) -> Tensor:
    """The least probability `[n, 1]` that is kept of each row: that of the token whose sum reaches top_p `[n, 1]`."""

    def of(ranked: Tensor, top_p: Tensor) -> Tensor:
        before = (ranked.cumsum(-1) < top_p).sum(-1, keepdim=True)  # tokens before the one that reaches top_p
        return ranked.gather(-1, before.clamp(max=ranked.shape[-1] - 1))

    ranked = probs.topk(min(HEAD, probs.shape[-1])).values
    least = of(ranked, top_p)
    beyond = (ranked.sum(-1, keepdim=True) < top_p)[:, 0].nonzero()[:, 0]
    if len(beyond):
        least[beyond] = of(probs[beyond].sort(descending=True).values, top_p[beyond])
    return least


def _reported(token: int, row: Tensor, count: int) -> Sampled:
    logprobs = row.float().log_softmax(-1)
    values, tokens = logprobs.topk(count)
    return Sampled(token, float(logprobs[token]), tuple(zip(tokens.tolist(), values.tolist(), strict=True)))
