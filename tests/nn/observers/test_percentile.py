import pytest
import torch

from qat.nn.observers.percentile import Percentile
from qat.numerics.granularity import PerGroup, PerTensor
from qat.numerics.grid import IntGrid
from qat.numerics.scheme import Scheme

WHOLE = Scheme(IntGrid(8), PerTensor())


def test_the_most_extreme_elements_are_left_out_on_either_side():
    x = torch.randperm(1000).float().view(10, 100)
    low, high = Percentile(99.0).observe(x, WHOLE, torch.bfloat16)
    assert (low.tolist(), high.tolist()) == ([10.0], [989.0])


def test_a_group_too_small_for_it_loses_none():
    x = torch.randn(4, 64)
    low, high = Percentile(99.0).observe(x, Scheme(IntGrid(8), PerGroup(32)), torch.bfloat16)
    assert torch.equal(low, x.view(4, 2, 32).amin(-1))
    assert torch.equal(high, x.view(4, 2, 32).amax(-1))


def test_batches_are_averaged():
    observer, old = Percentile(100.0), None
    ranges = [observer.observe(torch.randn(8, 16) * 3, WHOLE, torch.bfloat16) for _ in range(4)]
    for seen, new in enumerate(ranges):
        old = new if old is None else observer.merge(old, new, seen)
    assert torch.allclose(old[0], torch.stack([low for low, _ in ranges]).mean(0))
    assert torch.allclose(old[1], torch.stack([high for _, high in ranges]).mean(0))


@pytest.mark.parametrize("percent", [50.0, 100.1])
def test_a_percentile_outside_its_range_is_refused(percent):
    with pytest.raises(ValueError, match=r"expected 50 < percent <= 100"):
        Percentile(percent)
