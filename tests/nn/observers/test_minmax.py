import torch
from tiny import scheme

from qat.nn.observers.minmax import MinMax


def test_range_is_that_of_each_group():
    x = torch.randn(4, 64)
    lo, hi = MinMax().observe(x, scheme(), torch.bfloat16)
    assert torch.equal(lo, x.view(4, 2, 32).amin(-1))
    assert torch.equal(hi, x.view(4, 2, 32).amax(-1))
