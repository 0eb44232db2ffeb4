from dataclasses import replace

import pytest
import torch
from tiny import scheme

from qat.nn.observers.minmax import MinMax
from qat.nn.observers.mse import MSE
from qat.numerics.affine import dequantize, qparams, quantize, ranges


def error(x, s, qp, norm=2.0):
    back = dequantize(quantize(x, *qp, s.grid), *qp, torch.float32)
    return (back - x).abs().pow(norm).view(len(x), -1, 32).sum(-1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_no_group_is_worse_than_minmax_and_most_low_bit_groups_are_better(bits, symmetric):
    x, s = torch.randn(64, 64), scheme(bits, 32, symmetric)
    searched = error(x, s, MSE(40).qparams(x, s, torch.bfloat16))
    full = error(x, s, MinMax().qparams(x, s, torch.bfloat16))
    assert bool((searched <= full * (1 + 1e-5)).all())
    assert float((searched < full).float().mean()) > (0.7 if bits < 4 else 0.4)


@pytest.mark.parametrize("norm", [2.0, 2.4])
def test_it_finds_the_best_candidate_by_brute_force(norm):
    x, s = torch.randn(8, 64), replace(scheme(3), convention="ct")
    lo, hi = ranges(x, s)
    candidates = [qparams(lo * f, hi * f, s, torch.bfloat16) for f in torch.linspace(1, 0.2, 17).tolist()]
    best = torch.stack([error(x, s, qp, norm) for qp in candidates]).amin(0)
    found = error(x, s, MSE(17, 0.2, norm).qparams(x, s, torch.bfloat16), norm)
    assert torch.allclose(found, best, rtol=1e-3)


def test_signed_scales_are_tried_with_either_sign():
    x, s = torch.randn(64, 64), replace(scheme(2), convention="signed")
    lo, hi = ranges(x, s)
    ends = [e for f in torch.linspace(1, 0.2, 17).tolist() for e in ((lo * f, hi * f), (-hi * f, -lo * f))]
    best = torch.stack([error(x, s, qparams(*e, s, torch.bfloat16)) for e in ends]).amin(0)
    found = MSE(17).qparams(x, s, torch.bfloat16)
    assert torch.allclose(error(x, s, found), best, rtol=1e-3)
    longer = MinMax().qparams(x, s, torch.bfloat16)[0].sign()
    assert bool((found[0].sign() != longer).any())


def test_one_point_is_minmax():
    x, s = torch.randn(8, 64), replace(scheme(3), convention="ct")
    assert torch.equal(MSE(1).qparams(x, s, torch.bfloat16)[0], MinMax().qparams(x, s, torch.bfloat16)[0])


def test_rows_are_searched_in_parts_with_the_same_result(monkeypatch):
    x, s = torch.randn(64, 64), scheme(3)
    whole = MSE(10).observe(x, s, torch.bfloat16)
    monkeypatch.setattr(MSE, "ROWS", 10)
    assert all(torch.equal(a, b) for a, b in zip(MSE(10).observe(x, s, torch.bfloat16), whole, strict=True))


@pytest.mark.parametrize("bad", [{"points": 0}, {"smallest": 0.0}, {"smallest": 1.5}, {"norm": 0.0}])
def test_settings_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        MSE(**bad)
