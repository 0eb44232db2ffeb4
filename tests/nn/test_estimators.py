"""Law (i): gradients against closed form in float64, on the clip edges and beside them."""

import math

import pytest
import torch

from qat.nn.estimators import LSQ, Clipped, StraightThrough

N, P = -4, 3
ULP = 2.0**-50
EDGES = [e for b in (N - 0.5, N, P, P + 0.5) for e in (b - 1, b - ULP * 8, b, b + ULP * 8, b + 0.25)]
V = torch.tensor([*EDGES, -0.5, 0.0, 0.5, 1.4999, 1.5, 2.5], dtype=torch.float64)
G = torch.linspace(-2, 3, len(V), dtype=torch.float64)


def test_straight_through_passes_everything():
    dx, ds = StraightThrough().gradients(G, V.clone(), N, P, None)
    assert torch.equal(dx, G)
    assert ds is None


def test_clipped_masks_on_the_rounded_code():
    dx, ds = Clipped().gradients(G, V.clone(), N, P, None)
    expected = [g if N <= round(v) <= P else 0.0 for g, v in zip(G.tolist(), V.tolist(), strict=True)]
    assert dx.tolist() == expected
    assert ds is None
    inside = {v: bool(x) for v, x in zip(V.tolist(), (dx != 0).tolist(), strict=True)}
    assert inside[N - 0.5]  # rounds half to even: -4.5 -> -4
    assert inside[P + 0.5 - ULP * 8]
    assert not inside[P + 0.5]  # 3.5 -> 4


@pytest.mark.parametrize("zero", [0, 2])
def test_lsq_is_equations_3_and_5(zero):
    dx, ds = LSQ(scale_gradient=False).gradients(G, V.clone(), N, P, torch.tensor(zero) if zero else None)
    for g, v, x, s in zip(G.tolist(), V.tolist(), dx.tolist(), ds.tolist(), strict=True):
        if v <= N:
            assert (x, s) == (0.0, pytest.approx(g * (N - zero)))
        elif v >= P:
            assert (x, s) == (0.0, pytest.approx(g * (P - zero)))
        else:
            assert (x, s) == (g, pytest.approx(g * (round(v) - v)))


def test_lsq_gradient_scale_counts_the_elements_that_share_a_scale():
    v, g = torch.randn(5, 7, 16, dtype=torch.float64), torch.randn(5, 7, 16, dtype=torch.float64)
    _, plain = LSQ(scale_gradient=False).gradients(g, v.clone(), N, P, None)
    _, scaled = LSQ().gradients(g, v.clone(), N, P, None)
    assert torch.allclose(scaled, plain / math.sqrt(16 * P))


def test_lsq_is_the_derivative_between_the_jumps():
    """With the codes held, d/ds of (q - z) s is q - z; straight-through adds -x/s inside. Finite differences agree."""
    x = torch.tensor([0.3, -0.9, 5.0, -7.0, 1.2], dtype=torch.float64)
    for zero in (0, 1):

        def value(s, codes=None, zero=zero):
            v = x / s + zero
            codes = torch.round(x / s) + zero if codes is None else codes
            inside = (v > N) & (v < P)
            return torch.where(inside, (codes - v) * s, (codes.clamp(N, P) - zero) * s).sum()

        s = 0.5
        codes = torch.round(x / s) + zero
        numeric = float((value(s + 1e-6, codes) - value(s - 1e-6, codes)) / 2e-6)
        _, ds = LSQ(scale_gradient=False).gradients(
            torch.ones(5, dtype=torch.float64), x / s + zero, N, P, torch.tensor(zero) if zero else None
        )
        # inside, (q - v) s = q s - x - z s: its derivative is q - z, and straight-through subtracts x / s
        inside = (x / s + zero > N) & (x / s + zero < P)
        assert float(ds.sum()) == pytest.approx(numeric - float((x / s + 0)[inside].sum()), abs=1e-5)
