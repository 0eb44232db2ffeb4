"""Seeded draws follow the filtered distribution, and depend on (seed, position) and the row alone."""

import math
from typing import Any

import pytest
import torch

from qat.engine import sampler
from qat.engine.config import SamplingParams
from qat.engine.sampler import HEAD, draw, filtered, sample, uniforms
from qat.engine.sequence import Sequence

ROW = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 2


def sequence(position: int = 1, **params: Any) -> Sequence:
    return Sequence(0, (1,) * position, SamplingParams(**params), max_len=10**6)


def by_hand(row: torch.Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> list[float]:
    """The filters as the parameters describe them, one token at a time."""
    probs = torch.softmax(row.double() / temperature, -1).tolist()
    order = sorted(range(len(probs)), key=lambda i: -probs[i])
    kept = order[:top_k] if top_k > 0 else order
    mass, nucleus = sum(probs[i] for i in kept), []
    for i in kept:
        nucleus.append(i)
        if sum(probs[j] for j in nucleus) >= top_p * mass:
            break
    kept = [i for i in nucleus if probs[i] >= min_p * probs[order[0]]]
    total = sum(probs[i] for i in kept)
    return [probs[i] / total if i in kept else 0.0 for i in range(len(probs))]


FILTERS = [
    {"temperature": 1.0},
    {"temperature": 0.6, "top_k": 5},
    {"temperature": 1.5, "top_p": 0.7},
    {"temperature": 1.0, "min_p": 0.2},
    {"temperature": 2.0, "top_k": 20, "top_p": 0.9, "min_p": 0.05},
    {"temperature": 1.0, "top_k": 1000, "top_p": 1.0, "min_p": 0.0},
]


@pytest.mark.parametrize("params", FILTERS, ids=str)
def test_filters_mean_what_they_say(params: dict[str, Any]) -> None:
    full = {"top_k": -1, "top_p": 1.0, "min_p": 0.0} | params
    probs = filtered(ROW[None], [SamplingParams(**params)])[0]
    torch.testing.assert_close(probs / probs.sum(), torch.tensor(by_hand(ROW, **full), dtype=torch.float64))


@pytest.mark.parametrize("params", FILTERS, ids=str)
def test_draws_follow_the_distribution(params: dict[str, Any]) -> None:
    """Chi-square over 20 000 seeded draws; the bound is four standard deviations above its mean."""
    probs = filtered(ROW[None], [SamplingParams(**params)])[0]
    heaped = uniforms([11] * 20_000, range(20_000))
    counts = torch.zeros(len(ROW), dtype=torch.float64)
    shares = probs.cumsum(0) / probs.sum()
    for token in torch.searchsorted(shares, heaped, right=True).tolist():
        counts[token] += 1
    some = heaped[::997].contiguous()  # the fast count above is what draw does
    assert torch.equal(draw(probs.expand(len(some), -1), some), torch.searchsorted(shares, some, right=True))
    expected = probs / probs.sum() * 20_000
    assert bool((counts[expected == 0] == 0).all())
    seen = expected > 5
    chi_square = float(((counts - expected)[seen] ** 2 / expected[seen]).sum())
    freedom = int(seen.sum()) - 1
    assert chi_square < freedom + 4 * math.sqrt(2 * freedom) + 1e-9


def test_a_large_vocabulary_gives_the_same_nucleus() -> None:
    row = torch.randn(8 * HEAD, generator=torch.Generator().manual_seed(0)) * 0.1  # flat: the nucleus is beyond HEAD
    for top_p in (0.01, 0.5, 0.999):
        probs = filtered(row[None], [SamplingParams(temperature=1.0, top_p=top_p)])[0]
        expected = by_hand(row, 1.0, -1, top_p, 0.0) if top_p < 0.1 else None
        share = float(probs.sum())
        assert top_p <= share < top_p + 1e-3
        if expected:
            torch.testing.assert_close(probs / share, torch.tensor(expected, dtype=torch.float64))


def test_a_nucleus_that_ends_where_the_head_does() -> None:
    """Of equal tokens, top_p times as many: one fewer, as many and one more than the head has."""
    size = 2 * HEAD
    row = torch.zeros(size)
    for kept in (HEAD - 1, HEAD, HEAD + 1):
        row = torch.arange(size, 0, -1) * 1e-4
        probs = row.double().softmax(-1)
        exact = float(probs[:kept].cumsum(-1)[-1])
        found = filtered(row[None], [SamplingParams(temperature=1.0, top_p=exact - 1e-7)])[0]
        assert int((found > 0).sum()) == kept
        more = filtered(row[None], [SamplingParams(temperature=1.0, top_p=exact + 1e-7)])[0]
        assert int((more > 0).sum()) == kept + 1


def test_a_token_that_reaches_top_p_exactly_is_the_last() -> None:
    row = torch.tensor([0.5, 0.25, 0.125, 0.125]).log()
    found = filtered(row[None], [SamplingParams(temperature=1.0, top_p=0.75)])[0]
    assert (found > 0).tolist() == [True, True, False, False]


def test_uniform_is_uniform_and_stateless() -> None:
    values = uniforms([seed for seed in range(40) for _ in range(250)], [*range(250)] * 40)
    assert 0 <= float(values.min()) < float(values.max()) < 1
    counts = torch.histc(values.float(), 50, 0, 1)
    assert float(((counts - 200) ** 2 / 200).sum()) < 49 + 4 * math.sqrt(98)
    pairs = [(5, 7), (7, 5), (-(2**63), 0), (2**63 - 1, 0), (-1, 2**40)]
    one_by_one = [float(uniforms([seed], [position])) for seed, position in pairs]
    assert uniforms(*zip(*pairs, strict=True)).tolist() == one_by_one
    assert one_by_one == [by_definition(*pair) for pair in pairs]


def by_definition(seed: int, position: int) -> float:
    """Two rounds of splitmix64 in Python's integers."""
    mask = 2**64 - 1

    def splitmix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) & mask
        x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ x >> 27) * 0x94D049BB133111EB) & mask
        return x ^ x >> 31

    return (splitmix(splitmix(seed & mask) ^ (position * 0x9E3779B97F4A7C15 & mask)) >> 11) * 2.0**-53


@pytest.mark.parametrize("u", [0.0, 0.5, math.nextafter(1, 0)])
def test_draw_never_takes_a_filtered_token(u: float) -> None:
    probs = torch.tensor([0.0, 0.0, 0.3, 0.0, 0.7, 0.0], dtype=torch.float64)
    at = torch.tensor([u], dtype=torch.float64)
    assert draw(probs[None], at).item() in (2, 4)
    assert draw(torch.tensor([[0.0, 1e-300, 0.0]], dtype=torch.float64), at).item() == 1


@pytest.mark.parametrize("at_once", [512, 2])
def test_neighbours_change_nothing(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "ROWS", at_once)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(7, 300, generator=generator) * 3
    filters = [{}, {"top_k": 9}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 20, "top_p": 0.5}, {"greedy_tokens": 2}, {}]
    sequences = [
        sequence(i + 1, temperature=i * 0.4, seed=i, logprobs=2 if i % 2 else None, **filters[i]) for i in range(7)
    ]
    together = sample(rows, sequences)
    for i in range(7):
        assert sample(rows[i : i + 1], sequences[i : i + 1]) == [together[i]]
    poisoned = rows.clone()
    poisoned[3] = torch.nan
    assert sample(poisoned, sequences) == [*together[:3], None, *together[4:]]


def test_greedy_is_argmax_and_a_tiny_temperature_agrees() -> None:
    best = int(ROW.argmax())
    for temperature in (0, 5e-324, 1e-30, 1e-3):
        for seed in range(5):
            (sampled,) = sample(ROW[None], [sequence(temperature=temperature, seed=seed)])
            assert sampled is not None
            assert sampled.token == best


def test_rows_have_filters_of_their_own() -> None:
    params = [SamplingParams(**filters) for filters in FILTERS]
    together = filtered(ROW.expand(len(params), -1), params)
    for row, own in zip(together, params, strict=True):
        assert torch.equal(row, filtered(ROW[None], [own])[0])


def test_the_first_tokens_are_greedy_where_asked() -> None:
    mixed = sequence(temperature=1.0, seed=4, greedy_tokens=3)
    said = []
    for _ in range(6):
        (sampled,) = sample(ROW[None], [mixed])
        assert sampled is not None
        said.append(sampled.token)
        mixed.output.append(sampled.token)
    assert said[:3] == [int(ROW.argmax())] * 3
    plain = sequence(temperature=1.0, seed=4)
    plain.output += said[:3]
    for token in said[3:]:  # the draws are those of a sequence that never was greedy
        (sampled,) = sample(ROW[None], [plain])
        assert sampled is not None
        assert sampled.token == token
        plain.output.append(token)
    assert said[3:] != [int(ROW.argmax())] * 3


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("temperature", [0, 1])
def test_rows_that_are_not_finite_give_nothing(poison: float, temperature: float) -> None:
    rows = ROW.repeat(3, 1)
    rows[1, 17] = poison
    first, second, third = sample(rows, [sequence(temperature=temperature, seed=1) for _ in range(3)])
    assert second is None
    assert first == third is not None


@pytest.mark.parametrize("temperature", [0, 1.7])
def test_logprobs_are_of_the_raw_logits(temperature: float) -> None:
    (sampled,) = sample(ROW[None], [sequence(temperature=temperature, top_k=3, seed=2, logprobs=4)])
    assert sampled is not None
    logprobs = ROW.log_softmax(-1)
    assert sampled.logprob == pytest.approx(float(logprobs[sampled.token]), abs=1e-6)
    assert [token for token, _ in sampled.top] == logprobs.argsort(descending=True)[:4].tolist()
    assert [value for _, value in sampled.top] == pytest.approx(logprobs.sort(descending=True).values[:4].tolist())
    (only,) = sample(ROW[None], [sequence(logprobs=0)])
    assert only is not None
    assert only.top == ()
    assert only.logprob is not None
