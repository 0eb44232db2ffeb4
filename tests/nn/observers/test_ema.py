import pytest
import torch
from tiny import scheme

from qat.nn.observers.ema import EMA


def test_the_average_follows_with_its_decay():
    x = torch.randn(4, 64)
    low, high = EMA(0.75).observe(x, scheme(), torch.bfloat16)
    assert torch.equal(low, x.view(4, 2, 32).amin(-1))
    assert torch.equal(high, x.view(4, 2, 32).amax(-1))
    low, high = EMA(0.75).merge((torch.tensor(-4.0), torch.tensor(8.0)), (torch.tensor(-8.0), torch.tensor(0.0)), 3)
    assert (float(low), float(high)) == (-5.0, 6.0)


def test_a_decay_of_zero_forgets():
    assert EMA(0.0).merge((torch.zeros(1), torch.ones(1)), (torch.ones(1), 2 * torch.ones(1)), 9)[1] == 2


@pytest.mark.parametrize("decay", [-0.1, 1.0])
def test_a_decay_outside_its_range_is_refused(decay):
    with pytest.raises(ValueError, match=r"expected 0 <= decay < 1"):
        EMA(decay)
