import torch
from tiny import scheme

from qat.nn.observers.base import Observer
from qat.numerics.affine import qparams


class Fixed(Observer):
    def observe(self, x, scheme, dtype, g=None):
        shape = scheme.granularity.scale_shape(tuple(x.shape))
        return torch.full(shape, -1.0), torch.full(shape, 3.0)


def test_qparams_follow_from_the_observed_range():
    for symmetric in (True, False):
        s = scheme(4, 32, symmetric)
        found = Fixed().qparams(torch.randn(2, 64), s, torch.bfloat16)
        expected = qparams(torch.full((2, 2), -1.0), torch.full((2, 2), 3.0), s, torch.bfloat16)
        assert torch.equal(found[0], expected[0])
        assert symmetric or torch.equal(found[1], expected[1])
