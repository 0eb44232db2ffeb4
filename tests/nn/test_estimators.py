"""Law (i): gradients against closed form in float64, on the clip edges and beside them."""

import math

import pytest
import torch

from qat.nn.estimators import LSQ, PACT, SEQ, Clipped, EfficientQAT, LSQPlus, Rounded, StraightThrough
from qat.numerics.grid import Codebook, FloatGrid, IntGrid
from qat.numerics.levels import snap

INT3, FP4, TERNARY, SEQ2, BINARY = (
    IntGrid(3),
    FloatGrid("e2m1"),
    Codebook("ternary"),
    Codebook("seq2"),
    Codebook("binary"),
)
GRIDS = [(INT3, 0), (INT3, 2), (FP4, 0), (TERNARY, 0), (SEQ2, 0), (BINARY, 0)]
ids = [f"{grid}{f'_z{z}' if z else ''}" for grid, z in GRIDS]


def points(grid, z):
    """u on every edge that any estimator has, beside each, and inside."""
    reach = 0.99 * grid.reach
    ends = [grid.low - z, grid.high - z, grid.low - z - grid.outer, grid.high - z + grid.outer, -reach, reach]
    ends += [-grid.reach, grid.reach]
    beside = [e + d for e in ends for d in (-1.0, -1e-12, 0.0, 1e-12, 0.25)]
    return torch.tensor([*beside, -0.5, 0.0, 0.5, 0.9, 1.4999, 1.5], dtype=torch.float64)


def rounded(grid, z, u, elements=1):
    zero = torch.tensor(float(z), dtype=torch.float64) if z else None
    level = snap(u, grid, zero)
    integer = isinstance(grid, IntGrid)
    return Rounded(u, level, grid.low - z, grid.high - z, grid.outer, integer, grid.high, grid.reach, elements)


def run(estimator, grid, z):
    """(u, level, G, dx, ds, dz) of every point, as numbers."""
    u = points(grid, z)
    grad = torch.linspace(-2, 3, len(u), dtype=torch.float64)
    seen = rounded(grid, z, u)
    outs = [torch.full_like(u, torch.nan) if t is None else t for t in estimator.gradients(grad, seen)]
    return list(zip(*(t.tolist() for t in (u, seen.level, grad, *outs)), strict=True))


def rounds_inside(grid, z, u):
    if isinstance(grid, IntGrid):
        return grid.qmin <= round(u) + z <= grid.qmax  # Python rounds half to even too
    return grid.low - grid.outer < u < grid.high + grid.outer


@pytest.mark.parametrize(("grid", "z"), GRIDS, ids=ids)
def test_straight_through_passes_everything(grid, z):
    for _, _, g, dx, ds, dz in run(StraightThrough(), grid, z):
        assert dx == g
        assert math.isnan(ds)
        assert math.isnan(dz)


@pytest.mark.parametrize(("grid", "z"), GRIDS, ids=ids)
def test_clipped_masks_on_the_rounded_code(grid, z):
    for u, _, g, dx, ds, dz in run(Clipped(), grid, z):
        assert dx == (g if rounds_inside(grid, z, u) else 0.0), u
        assert math.isnan(ds)
        assert math.isnan(dz)
    inside = {u: dx != 0 for u, _, _, dx, _, _ in run(Clipped(), INT3, 0)}
    assert inside[-4.5]  # rounds half to even: -4.5 -> -4
    assert not inside[3.5]  # 3.5 -> 4


@pytest.mark.parametrize(("grid", "z"), GRIDS, ids=ids)
@pytest.mark.parametrize("estimator", [LSQ(False), LSQPlus(False)], ids=["lsq", "lsq_plus"])
def test_lsq_is_equations_3_and_5(estimator, grid, z):
    low, high = grid.low - z, grid.high - z
    for u, level, g, dx, ds, dz in run(estimator, grid, z):
        inside = low < u < high
        assert dx == (g if inside else 0.0)
        assert ds == pytest.approx(g * (level - u if inside else (low if u <= low else high)), abs=1e-12)
        if isinstance(estimator, LSQPlus):
            assert dz == (0.0 if inside else -g)  # of dz / s: db = G outside, and b = -z s
        else:
            assert math.isnan(dz)


@pytest.mark.parametrize(("grid", "z"), GRIDS[:2], ids=ids[:2])
def test_efficient_qat_is_what_autograd_makes_of_its_forward(grid, z):
    """Its code: clamp(round_ste(x / s) + clamp(round_ste(z))), all else differentiated."""
    ste = lambda t: t + (t.round() - t).detach()  # noqa: E731
    for u, _, g, dx, ds, dz in run(EfficientQAT(), grid, z):
        s = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
        x = torch.tensor(u * 0.7, dtype=torch.float64, requires_grad=True)
        zero = torch.tensor(float(z), dtype=torch.float64, requires_grad=True)
        value = ((ste(x / s) + ste(zero)).clamp(grid.qmin, grid.qmax) - ste(zero)) * s
        value.backward(torch.tensor(g, dtype=torch.float64))
        if float((x / s).detach()) != u:
            continue  # the product and the quotient moved an edge
        assert dx == pytest.approx(float(x.grad), abs=1e-12)
        assert ds == pytest.approx(float(s.grad), abs=1e-9)
        assert dz * 0.7 == pytest.approx(float(zero.grad), abs=1e-12)


@pytest.mark.parametrize(("grid", "z"), [(INT3, 0), (INT3, -4)], ids=["symmetric", "unsigned"])
def test_pact_moves_its_clipping_level_from_outside_only(grid, z):
    low, high = grid.low - z, grid.high - z
    for u, _, g, dx, ds, _ in run(PACT(), grid, z):
        inside = low < u < high
        assert dx == (g if inside else 0.0)
        assert ds == (0.0 if inside else g * (low if u <= low else high))  # a = high s: da = G, ds = high G


@pytest.mark.parametrize("grid", [TERNARY, SEQ2], ids=str)
@pytest.mark.parametrize("published", [False, True])
def test_seq_is_paretoqs(grid, published):
    """In the paper's terms: a = reach s, levels (rnd(c L - t) + t) / L with c = clip(x / a, -0.99, 0.99)."""
    big_l, t = (1.5, 0.0) if grid is TERNARY else (2.0, 0.5)
    for u, level, g, dx, ds, _ in run(SEQ(published), grid, 0):
        over_a = u / grid.reach
        inside = abs(over_a) <= 0.99
        if abs(abs(over_a) - 0.99) < 1e-11 and abs(u) != 0.99 * grid.reach:
            continue  # u / reach rounds onto the edge
        fraction = min(max(over_a, -0.99), 0.99) * big_l - t
        if abs(fraction % 1 - 0.5) > 1e-9:  # ties differ: half upwards here
            assert level / grid.reach == pytest.approx((round(fraction) + t) / big_l)
        assert dx == (g if inside else 0.0)
        edge = (big_l - t) / big_l if published else grid.high / grid.reach
        da = level / grid.reach - over_a if inside else math.copysign(edge, u)
        assert ds == pytest.approx(g * da * grid.reach, abs=1e-12)
    assert SEQ(True).published


def test_seq_on_one_bit_is_the_mean_field_of_signs():
    for u, level, g, dx, ds, _ in run(SEQ(), BINARY, 0):
        assert level == (1.0 if u >= 0 else -1.0)
        assert dx == (g if abs(u) <= 1 else 0.0)
        assert ds == g * level


def test_the_gradient_scale_counts_the_elements_that_share_a_scale():
    u, g = torch.randn(5, 7, 16, dtype=torch.float64) * 3, torch.randn(5, 7, 16, dtype=torch.float64)
    for with_it, without in ((LSQ(), LSQ(False)), (LSQPlus(), LSQPlus(False))):
        plain = without.gradients(g, rounded(INT3, 0, u, 16))
        scaled = with_it.gradients(g, rounded(INT3, 0, u, 16))
        assert torch.equal(plain[0], scaled[0])
        for a, b in zip(plain[1:], scaled[1:], strict=True):
            assert a is None or torch.allclose(b, a / math.sqrt(16 * 3))


@pytest.mark.parametrize("estimator", [LSQ(False), EfficientQAT(), SEQ()], ids=["lsq", "efficient_qat", "seq"])
def test_scale_gradients_are_derivatives_where_the_function_is_smooth(estimator):
    """gradcheck of x -> level(x / s) s by s, codes held, plus the straight-through part of x / s inside."""
    grid = SEQ2 if isinstance(estimator, SEQ) else INT3
    x = torch.tensor([0.31, -0.93, 5.1, -7.2, 1.27, -0.05], dtype=torch.float64)

    def smooth(s):
        u = x / s
        level = snap(u.detach(), grid)
        inside = (u.detach() > grid.low) & (u.detach() < grid.high)
        # inside, rounding passes d(x / s) straight through: level + (u - u.detach())
        return torch.where(inside, (level + (u - u.detach())) * s, level * s)

    s = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    held = x / 0.5
    level = snap(held, grid)
    inside = (held > grid.low) & (held < grid.high)
    _, ds, _ = estimator.gradients(torch.ones_like(x), rounded(grid, 0, held))
    (expected,) = torch.autograd.grad(smooth(s).sum(), s)
    assert float(ds.sum()) == pytest.approx(float(expected))
    assert torch.autograd.gradcheck(
        lambda s: torch.where(inside, level * s + (x - held * s), level * s), s, eps=1e-7, atol=1e-8
    )
