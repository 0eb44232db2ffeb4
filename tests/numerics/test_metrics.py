import math

import torch

from qat.numerics.metrics import kl, nll, sqnr, top1_agree


def test_nll_survives_a_gap_that_softmax_in_bf16_does_not():
    logits = torch.tensor([[0.0, 120.0]], dtype=torch.bfloat16)
    assert float(nll(logits, torch.tensor([0]))) == 120.0


def test_kl_is_its_definition_and_zero_for_equals():
    p, q = torch.randn(300, 50, dtype=torch.float64), torch.randn(300, 50, dtype=torch.float64)
    expected = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
    assert torch.allclose(kl(p, q).double(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(kl(p, p), torch.zeros(300))
    assert torch.equal(kl(p, q, chunk=7), kl(p, q, chunk=300))


def test_top1_agree():
    assert top1_agree(torch.eye(3), torch.eye(3).roll(1, 0)).tolist() == [False] * 3


def test_sqnr():
    x = torch.ones(10)
    assert sqnr(x, x) == math.inf
    assert math.isclose(sqnr(x, x * 1.1), 20.0, rel_tol=1e-5)
