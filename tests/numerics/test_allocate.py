import itertools
import random

import pytest
import torch
from tiny import scheme

from qat.numerics.affine import divisor, rtn
from qat.numerics.allocate import allocate, at_width, budget_bits, monotone, stored_bits
from qat.numerics.granularity import PerChannel, PerGroup, PerTensor
from qat.numerics.grid import Codebook, FloatGrid, IntGrid
from qat.numerics.qtensor import QuantizedTensor
from qat.numerics.scheme import E4M3, E8M0, Scheme


def instance(generator: random.Random, units: int, options: int) -> list[list[tuple[int, float]]]:
    def option():
        return generator.randint(1, 20), generator.choice([0.0, generator.random(), 10 * generator.random()])

    return [[option() for _ in range(generator.randint(1, options))] for _ in range(units)]


def cost(options, choices):
    picked = [unit[c] for unit, c in zip(options, choices, strict=True)]
    return sum(bits for bits, _ in picked), sum(loss for _, loss in picked)


def test_nothing_within_the_budget_loses_less():
    generator = random.Random(0)
    for _ in range(400):
        options = instance(generator, generator.randint(1, 5), 4)
        least = sum(min(bits for bits, _ in unit) for unit in options)
        most = sum(max(bits for bits, _ in unit) for unit in options)
        budget = generator.randint(least, most + 2)
        every = [cost(options, choices) for choices in itertools.product(*(range(len(unit)) for unit in options))]
        best = min(loss for bits, loss in every if bits <= budget)
        found = allocate(options, budget)
        assert cost(options, found.choices) == (found.bits, pytest.approx(found.loss))
        assert found.bits <= budget
        assert found.loss == pytest.approx(best)
        assert found.bound <= found.loss
        assert found.bits == min(bits for bits, loss in every if bits <= budget and loss <= best + 1e-12)


def test_a_whole_model_is_allocated_and_its_bound_is_near():
    generator = random.Random(1)
    sizes = 30 * [9, 3, 3, 9, 24, 24, 24]
    scales = [generator.lognormvariate(-6, 1.5) for _ in sizes]
    options = [[(n * (4 * b + 1), a * 4.0**-b) for b in (2, 3, 4, 8)] for n, a in zip(sizes, scales, strict=True)]
    found = allocate(options, 13 * sum(sizes))
    assert found.bits <= 13 * sum(sizes)
    assert found.loss == pytest.approx(found.bound, rel=1e-3)
    assert found.loss < 0.8 * sum(unit[1][1] for unit in options)  # one width for all


def test_the_smallest_options_must_fit():
    options = [[(2, 1.0), (4, 0.0)], [(3, 1.0)]]
    with pytest.raises(ValueError, match="the smallest options take 5 bits together"):
        allocate(options, 4)
    assert allocate(options, 5).choices == (0, 0)
    assert allocate(options, 10**9).choices == (1, 0)


def test_monotone_is_the_projection():
    assert monotone([4.0, 2.0, 1.0]) == [4.0, 2.0, 1.0]
    assert monotone([1.0, 3.0, 0.5]) == [2.0, 2.0, 0.5]
    assert monotone([1.0, 2.0, 3.0, 6.0]) == [3.0, 3.0, 3.0, 3.0]
    assert monotone([1.0, -1.0, -0.5]) == [1.0, 0.0, 0.0]
    generator = random.Random(2)
    for _ in range(50):
        losses = [generator.gauss(0, 1) for _ in range(5)]
        found = monotone(losses)
        assert all(a >= b >= 0 for a, b in itertools.pairwise(found))
        distance = sum((a - b) ** 2 for a, b in zip(losses, found, strict=True))
        for _ in range(50):
            other = sorted((max(x + generator.gauss(0, 0.1), 0.0) for x in found), reverse=True)
            assert sum((a - b) ** 2 for a, b in zip(losses, other, strict=True)) >= distance - 1e-12


@pytest.mark.parametrize("granularity", [PerGroup(16), PerChannel(), PerTensor()])
@pytest.mark.parametrize(("symmetric", "scale_dtype"), [(True, None), (False, None), (True, "float32")])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bits_are_those_of_the_quantized_tensor(granularity, symmetric, scale_dtype, dtype):
    for bits in (2, 3, 8):
        how = Scheme(IntGrid(bits), granularity, symmetric=symmetric, scale_dtype=scale_dtype)
        tensor = QuantizedTensor(*rtn(torch.randn(24, 32), how, dtype), how, (24, 32))
        assert stored_bits(how, (24, 32), dtype.itemsize * 8) == tensor.bits


@pytest.mark.parametrize(
    "how",
    [
        Scheme(FloatGrid("e2m1"), PerGroup(16), scale_dtype=E4M3),
        Scheme(FloatGrid("e4m3"), PerGroup(32), scale_dtype=E8M0),
        Scheme(Codebook("nf4"), PerGroup(16)),
    ],
    ids=str,
)
def test_bits_of_other_grids(how):
    weight = torch.randn(24, 32)
    g = divisor([weight], how)
    tensor = QuantizedTensor(*rtn(weight, how, torch.bfloat16, g), how, (24, 32), g)
    assert stored_bits(how, (24, 32)) == tensor.bits
    with pytest.raises(ValueError, match="only integer grids have widths"):
        at_width(how, 4)


def test_another_width_is_all_that_differs():
    assert at_width(scheme(4, 32, False), 3) == scheme(3, 32, False)


@pytest.mark.parametrize(
    ("budget", "words"),
    [
        (2.49, r"2\.49 bits per quantized weight are less than the smallest width takes; .* from 2\.5 to 8\.5"),
        (8.51, r"8\.51 bits per quantized weight are more than the largest width takes; .* from 2\.5 to 8\.5"),
    ],
)
def test_a_budget_that_cannot_be_met_or_has_no_use(budget, words):
    weights = [(scheme(4, 32), (64, 64)), (scheme(4, 32), (128, 64))]
    with pytest.raises(ValueError, match=words):
        budget_bits(budget, weights, [8, 2])


def test_both_ends_can_be_typed_as_they_are_printed():
    weights = [(scheme(4, 32, False), (64, 96))]  # 16 + b bits for each group of 32
    count = 64 * 96
    assert budget_bits(2.5625, weights, [2, 3]) == count * 2 + 192 * 18
    assert budget_bits(3.5938, weights, [2, 3]) >= count * 3 + 192 * 19  # 3.59375, rounded up
    with pytest.raises(ValueError, match=r"from 2\.5625 to 3\.5938"):
        budget_bits(3.6, weights, [2, 3])
