"""Sampler: the next token of every sequence, from its row of logits. One row never influences another."""

import math
from collections.abc import Sequence as Sequences
from dataclasses import dataclass

import torch
from torch import Tensor

from qat.engine.config import SamplingParams
from qat.engine.sequence import Sequence

MASK = 2**64 - 1
HEAD = 512  # top_p looks among this many tokens before it sorts the whole vocabulary


@dataclass(frozen=True)
class Sampled:
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
    greedy = logits.argmax(-1).tolist()
    result: list[Sampled | None] = []
    for i, sequence in enumerate(sequences):
        params, token = sequence.params, greedy[i]
        if not finite[i]:
            result.append(None)
            continue
        if params.temperature > 0:
            token = draw(filtered(logits[i], params), uniform(sequence.seed, len(sequence)))
        if params.logprobs is None:
            result.append(Sampled(token))
            continue
        logprobs = logits[i].float().log_softmax(-1)
        values, tokens = logprobs.topk(params.logprobs)
        top = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
        result.append(Sampled(token, float(logprobs[token]), top))
    return result


def filtered(row: Tensor, params: SamplingParams) -> Tensor:
    """Probabilities `[V]` (fp64) after temperature, top_k, top_p and min_p: 0 where filtered, the rest not normed."""
    scaled = (row.double() - row.double().max()) / params.temperature
    if 0 < params.top_k < len(row):
        scaled = scaled.masked_fill(scaled < scaled.topk(params.top_k).values[-1], -math.inf)
    probs = scaled.softmax(-1)
    if params.top_p < 1:
        ranked = probs.topk(min(HEAD, len(row))).values
        if float(ranked.sum()) < params.top_p:
            ranked = probs.sort(descending=True).values
        reached = int((ranked.cumsum(0) < params.top_p).sum())  # tokens before the one that reaches top_p
        probs = probs.masked_fill(probs < ranked[min(reached, len(ranked) - 1)], 0)
    if params.min_p > 0:
        probs = probs.masked_fill(probs < params.min_p * probs.max(), 0)
    return probs


def draw(probs: Tensor, u: float) -> int:
    """The token whose share of the summed probabilities `[V]` (fp64) holds u in [0, 1)."""
    heaped = probs.cumsum(0)
    total = float(heaped[-1])
    # A token of probability 0 has no share: the first sum beyond the target always belongs to one that has.
    target = min(u * total, math.nextafter(total, 0))
    return int((heaped <= target).sum())


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that is a pure function of both, the same on every device (two rounds of splitmix64)."""
    return (_mix(_mix(seed & MASK) ^ (position * 0x9E3779B97F4A7C15 & MASK)) >> 11) * 2.0**-53


def _mix(x: int) -> int:
    x = (x + 0x9E3779B97F4A7C15) & MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & MASK
    return x ^ x >> 31
