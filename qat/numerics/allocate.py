"""Allocation: which unit gets which width, so that a model fits a number of bits and loses least. Torch-free.

Units are whatever gets a width of its own. Their losses are taken to add up, which makes this a multiple-choice
knapsack:

    minimise  sum_u loss[u, c_u]    subject to    sum_u bits[u, c_u] <= budget

It is solved exactly (Nemhauser and Ullmann 1969): unit by unit, the list of partial sums that no other one beats in
both bits and loss, less those whose Lagrangian bound is above the loss of an allocation that is known already. The
bound for a multiplier m >= 0 is `sum_u min_c (loss[u, c] + m * bits[u, c]) - m * budget` (Everett 1963).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import ceil, prod

from qat.numerics.grid import IntGrid
from qat.numerics.scheme import E4M3, E8M0, Scheme

Options = Sequence[tuple[int, float]]
Shape = tuple[int, ...]
State = tuple[int, float, tuple]  # bits, loss, and the choices behind them, the last one first, as a linked list
SLACK = 1e-9  # of a bound, relative: sums in another order round differently


@dataclass(frozen=True)
class Allocation:
    """One option for each unit.

    Attributes:
        choices: Index of the option, unit by unit.
        bits: What they take together.
        loss: What they lose together: no allocation within the budget loses less.
        bound: The Lagrangian bound: a second way to see that less than this cannot be lost.
    """

    choices: tuple[int, ...]
    bits: int
    loss: float
    bound: float


def at_width(scheme: Scheme, bits: int) -> Scheme:
    """The scheme with another number of bits, all else equal.

    Raises:
        ValueError: Its grid has no widths to choose from.
    """
    if not isinstance(scheme.grid, IntGrid):
        raise ValueError(f"{scheme}: only integer grids have widths to choose from")
    return replace(scheme, grid=replace(scheme.grid, bits=bits))


def stored_bits(scheme: Scheme, shape: Shape, storage_bits: int = 16) -> int:
    """Bits of a weight's codes, scales and zero points, as `QuantizedTensor.bits` counts them.

    Args:
        scheme: How it is quantized.
        shape: `(O, I)`.
        storage_bits: Of the storage dtype, which scales have unless the scheme fixes another.
    """
    zeros = 0 if scheme.symmetric else scheme.grid.bits
    width = {None: storage_bits, "float32": 32, E4M3: 8, E8M0: 8}.get(scheme.scale_dtype, 16)
    scales = prod(scheme.granularity.scale_shape(shape))
    return prod(shape) * scheme.grid.bits + scales * (width + zeros) + 32 * scheme.two_level


def budget_bits(
    budget: float, weights: Sequence[tuple[Scheme, Shape]], widths: Sequence[int], storage_bits: int = 16
) -> int:
    """A budget in bits for each quantized weight as bits for all of them together.

    Args:
        budget: Bits for each weight: codes, scales and zero points.
        weights: Scheme and shape of every quantized weight.
        widths: Bits to choose from.
        storage_bits: Of the storage dtype.

    Raises:
        ValueError: Less than the smallest width takes, or more than the largest; names both ends.
    """
    count = sum(prod(shape) for _, shape in weights)
    least, most = (
        sum(stored_bits(at_width(scheme, bits), shape, storage_bits) for scheme, shape in weights)
        for bits in (min(widths), max(widths))
    )
    ends = f"{ceil(least / count * 1e4) / 1e4:g} to {ceil(most / count * 1e4) / 1e4:g}"
    if not least <= (found := int(budget * count + 0.5)) <= ceil(most / count * 1e4) / 1e4 * count:
        words = "less than the smallest width takes" if found < least else "more than the largest width takes"
        raise ValueError(
            f"{budget:g} bits per quantized weight are {words}; with bits={list(widths)} it goes from {ends}, scales "
            f"included"
        )
    return found


def monotone(losses: Sequence[float]) -> list[float]:
    """The nearest losses, in least squares, that never rise and are never negative: isotonic regression.

    More bits cannot truly hurt; where a measurement says so it is noise, and neighbours share their mean.

    Args:
        losses: By increasing width.
    """
    pools: list[tuple[float, int]] = []  # mean and how many share it
    for loss in losses:
        pools.append((loss, 1))
        while len(pools) > 1 and pools[-2][0] < pools[-1][0]:
            (b, n), (a, m) = pools.pop(), pools.pop()
            pools.append(((a * m + b * n) / (m + n), m + n))
    return [max(mean, 0.0) for mean, count in pools for _ in range(count)]


def allocate(options: Sequence[Options], budget: int) -> Allocation:
    """The allocation within a budget that loses least; of equal ones, the one with the fewest bits.

    Time grows with the number of partial sums that survive: some hundred for measured losses and the sizes of a
    model's matrices, which are multiples of each other.

    Args:
        options: For each unit, (bits, loss) of each option.
        budget: Bits that all of them may take together.

    Raises:
        ValueError: Not even the smallest options fit.
    """
    least = sum(min(bits for bits, _ in unit) for unit in options)
    if least > budget:
        raise ValueError(f"a budget of {budget} bits: the smallest options take {least} bits together")
    multiplier = _multiplier(options, budget)
    known = sum(options[u][c][1] for u, c in enumerate(_filled(options, budget, multiplier)))
    floors = [min(loss + multiplier * bits for bits, loss in unit) for unit in options]
    bound = sum(floors) - multiplier * budget
    limit = known + SLACK * (abs(known) + multiplier * budget)
    rest, room = bound, least
    states: list[State] = [(0, 0.0, ())]
    for unit, floor in zip(options, floors, strict=True):
        rest, room = rest - floor, room - min(bits for bits, _ in unit)
        states, reached = [], _extended(states, unit)
        best = float("inf")
        for bits, loss, chain in reached:
            if loss < best and bits + room <= budget and loss + multiplier * bits + rest <= limit:
                states.append((bits, loss, chain))
                best = loss
    bits, loss, chain = states[-1]
    choices: list[int] = []
    while chain:
        index, chain = chain
        choices.append(index)
    return Allocation(tuple(reversed(choices)), bits, loss, min(bound, loss))


def _extended(states: list[State], unit: Options) -> list[State]:
    """Every state with every option of one more unit, by increasing bits and then loss."""
    found = [
        (bits + more, loss + lost, (choice, chain))
        for bits, loss, chain in states
        for choice, (more, lost) in enumerate(unit)
    ]
    return sorted(found, key=lambda state: state[:2])


def _relaxed(options: Sequence[Options], multiplier: float) -> list[int]:
    """The best option of every unit where a bit costs `multiplier`; of equal ones, the smallest."""
    return [min(range(len(unit)), key=lambda c: (unit[c][1] + multiplier * unit[c][0], unit[c][0])) for unit in options]


def _taken(options: Sequence[Options], choices: Sequence[int]) -> int:
    return sum(unit[c][0] for unit, c in zip(options, choices, strict=True))


def _multiplier(options: Sequence[Options], budget: int) -> float:
    """The least price of a bit, found by bisection, at which the relaxed choice fits the budget."""
    if _taken(options, _relaxed(options, 0.0)) <= budget:
        return 0.0
    low, high = 0.0, 1e-30
    while _taken(options, _relaxed(options, high)) > budget:
        low, high = high, high * 16
    for _ in range(200):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (low, middle) if _taken(options, _relaxed(options, middle)) <= budget else (middle, high)
    return high


def _filled(options: Sequence[Options], budget: int, multiplier: float) -> list[int]:
    """The relaxed choice, and with what it leaves over, one best exchange after another."""
    choices = _relaxed(options, multiplier)
    while True:
        left = budget - _taken(options, choices)
        gains = [
            (options[u][now][1] - loss, u, c)
            for u, now in enumerate(choices)
            for c, (bits, loss) in enumerate(options[u])
            if bits - options[u][now][0] <= left and loss < options[u][now][1]
        ]
        if not gains:
            return choices
        _, u, c = max(gains)
        choices[u] = c
