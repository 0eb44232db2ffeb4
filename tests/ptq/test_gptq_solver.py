"""The solver against a naive implementation of its definition, and the laws that it must obey."""

import weakref

import pytest
import torch
from tiny import scheme
from tiny_grids import PAIRS
from torch.utils._python_dispatch import TorchDispatchMode

from qat.nn.observers.minmax import MinMax
from qat.nn.observers.mse import MSE
from qat.numerics.affine import qparams, quantize, ranges
from qat.numerics.granularity import PerChannel, PerGroup, PerTensor
from qat.numerics.grid import IntGrid
from qat.numerics.levels import decode
from qat.numerics.qtensor import consecutive
from qat.numerics.scheme import Scheme
from qat.ptq.gptq_solver import (
    accumulate_cross,
    accumulate_hessian,
    column_order,
    inverse_factor,
    quantize_weight,
    unequal,
)

SCHEMES = [
    Scheme(IntGrid(4), PerGroup(32)),
    Scheme(IntGrid(3), PerGroup(16), symmetric=False),
    Scheme(IntGrid(2), PerChannel()),
    Scheme(IntGrid(8), PerTensor()),
    Scheme(IntGrid(3), PerGroup(32), convention="signed"),
]

FLOATS = [PAIRS[name][0] for name in ("nvfp4", "mxfp4", "fp8")]


def problem(rows=24, columns=64, tokens=200, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * 0.3 + torch.eye(columns)
    x = (torch.randn(tokens, columns, generator=generator) @ mixing).to(dtype)
    hessian = torch.zeros(columns, columns, dtype=dtype)
    accumulate_hessian(hessian, x)
    return (torch.randn(rows, columns, generator=generator) * 0.05).to(dtype), x, hessian


def naive(weight, hessian, scheme, order, current=False, damping=0.01):
    """Optimal brain quantization with an explicit inverse, one column removed at a time, in fp64."""
    scale, zero_point = qparams(*ranges(weight, scheme), scheme, torch.bfloat16)
    size = weight.shape[1] // (scale.shape[-1] if isinstance(scheme.granularity, PerGroup) else 1)
    columns, members = weight.shape[1], torch.arange(weight.shape[1]).reshape(-1, size)
    damped = hessian.double() + torch.eye(columns, dtype=torch.float64) * damping * hessian.double().diagonal().mean()
    inverse, rest = torch.linalg.inv(damped), weight.double().clone()
    result, left, begun = torch.empty_like(rest), list(range(columns)), set()
    codes = torch.empty_like(weight, dtype=torch.int8)
    for c in order:
        if current and c // size not in begun:  # ranges of the weights at hand, when the first of a group is rounded
            now, zero = qparams(*ranges(rest[:, members[c // size]], scheme), scheme, torch.bfloat16)
            scale[:, c // size : c // size + 1] = now
            if zero is not None:
                zero_point[:, c // size : c // size + 1] = zero
            begun.add(c // size)
        s = (
            scale.double()
            .unsqueeze(-1)
            .expand(*scale.shape, weight.numel() // scale.numel())
            .reshape(weight.shape)[:, c]
        )
        z = 0.0
        if zero_point is not None:
            z = zero_point.double()[..., None].expand(*scale.shape, weight.numel() // scale.numel())
            z = z.reshape(weight.shape)[:, c]
        code = (torch.round(rest[:, c] / s) + z).clamp(scheme.grid.qmin, scheme.grid.qmax)
        codes[:, c], result[:, c] = code.to(torch.int8), (code - z) * s
        error = (rest[:, c] - result[:, c]) / inverse[c, c]
        rest[:, left] -= error[:, None] * inverse[c, left]
        left.remove(c)
        inverse = inverse - inverse[:, c : c + 1] @ inverse[c : c + 1] / inverse[c, c]
    return codes, result, scale


@pytest.mark.parametrize("act_order", ["none", "static", "group", "dynamic"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_equals_optimal_brain_quantization(scheme, act_order):
    """In fp64, to the last code."""
    weight, _, hessian = problem(dtype=torch.float64)
    size = scheme.granularity.group_size if isinstance(scheme.granularity, PerGroup) else 64
    order = column_order(hessian.diagonal(), act_order, size)
    back = order.argsort()
    for groups in ("static", "current") if isinstance(scheme.granularity, PerGroup) else ("static",):
        if (act_order, groups) == ("static", "current"):
            continue
        tensor, row = quantize_weight(weight, hessian, scheme, observer=MinMax(), act_order=act_order, groups=groups)
        if act_order == "dynamic":  # groups are of the columns of a weight that was permuted first
            permuted = weight[:, order], hessian[order][:, order]
            codes, result, scale = naive(*permuted, scheme, range(64), groups == "current")
            codes, result = codes[:, back], result[:, back]
            assert torch.equal(back // size, consecutive(64, 64 // size) if tensor.g_idx is None else tensor.g_idx)
        else:
            codes, result, scale = naive(weight, hessian, scheme, order.tolist(), groups == "current")
            assert tensor.g_idx is None
        assert torch.equal(tensor.codes, codes)
        assert torch.equal(tensor.scale, scale)
        assert float((tensor.dequantize(torch.float32).double() - result).abs().max()) <= 1e-9 * float(
            result.abs().max()
        )
        assert row["fallback"] is None


@pytest.mark.parametrize("act_order", ["none", "static", "group"])
@pytest.mark.parametrize("scheme", FLOATS, ids=str)
def test_on_floating_point_levels_it_is_the_plain_loop(scheme, act_order):
    """One column after the other, each on `s_b / g` with one g for the whole weight; H = c I takes every column alone.

    The loss is that of the error which the loop hands on, and so `1/2 tr(dW H dW^T)`.
    """
    weight, _, hessian = problem(dtype=torch.float64)
    weight[3] *= 8  # the largest element, of which g is, is not in the first row
    g = 448 * scheme.grid.high / weight.abs().max().float().reshape(1) if scheme.two_level else None
    scale, _ = qparams(*ranges(weight, scheme), scheme, torch.bfloat16, g)
    s = (scale.float() if g is None else scale.float() / g).double().repeat_interleave(64 // scale.shape[1], 1)
    levels = decode(torch.arange(256 if scheme.grid.name == "e4m3" else 16, dtype=torch.uint8), scheme.grid).double()
    levels = levels[levels.isfinite()]
    size = scheme.granularity.group_size if isinstance(scheme.granularity, PerGroup) else 64
    damped = hessian + torch.eye(64).double() * 0.01 * hessian.diagonal().mean()
    for white in (False, True):
        h = torch.eye(64).double() * 3.7 if white else hessian
        rest, result = weight.clone(), torch.empty_like(weight)
        left = order = column_order(h.diagonal(), act_order, size).tolist()
        for c in order:
            result[:, c] = levels[(rest[:, c : c + 1] / s[:, c : c + 1] - levels).abs().argmin(1)]
            inverse, left = torch.linalg.inv((h if white else damped)[left][:, left]), left[1:]
            error = (rest[:, c] - result[:, c] * s[:, c]) / inverse[0, 0]
            rest[:, left] -= error[:, None] * inverse[0, 1:]
        tensor, row = quantize_weight(weight, h, scheme, observer=MinMax(), act_order=act_order)
        assert torch.equal(decode(tensor.codes, scheme.grid).double(), result)
        assert torch.equal(tensor.scale.float(), scale.float())
        assert g is None or torch.equal(tensor.global_scale, g)
        if white:
            assert torch.equal(tensor.codes, quantize(weight, scale, None, scheme.grid, g))
        else:
            change = result * s - weight
            assert row["loss"] == pytest.approx(float(((change @ damped) * change).sum() / 2), rel=1e-9)


@pytest.mark.parametrize(
    ("order", "groups"), [("static", "static"), ("group", "current"), ("dynamic", "static"), ("dynamic", "current")]
)
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_do_not_depend_on_the_block_size(scheme, order, groups):
    weight, _, hessian = problem(dtype=torch.float64)
    found = [
        quantize_weight(weight, hessian, scheme, observer=MinMax(), act_order=order, groups=groups, block_size=size)[0]
        for size in (1, 32, 128, 64, 23)
    ]
    assert all(torch.equal(one.codes, found[0].codes) for one in found)
    assert all(torch.equal(one.scale, found[0].scale) for one in found)


def test_stale_ranges_are_those_at_the_beginning_of_a_block():
    """As the paper's code finds them; so with blocks of a group they are current, and with one block of all, static."""
    weight, _, hessian = problem(dtype=torch.float64)
    own = Scheme(IntGrid(3), PerGroup(16))

    def solved(groups, size):
        knobs = {"observer": MinMax(), "act_order": "none", "block_size": size}
        return quantize_weight(weight, hessian, own, groups=groups, **knobs)[0]

    for size, same in ((16, "current"), (8, "current"), (64, "static")):
        assert torch.equal(solved("stale", size).codes, solved(same, size).codes)
        assert torch.equal(solved("stale", size).scale, solved(same, size).scale)
    between = solved("stale", 32)
    assert torch.equal(between.scale[:, 2], solved("current", 32).scale[:, 2]) is False  # codes before it differ
    assert not torch.equal(between.scale, solved("static", 32).scale)
    assert torch.equal(between.scale[:, :2], solved("static", 32).scale[:, :2])


def test_the_group_aware_order_takes_whole_groups():
    diagonal = torch.tensor([1.0, 9.0, 2.0, 3.0, 4.0, 5.0, 8.0, 8.5])
    assert column_order(diagonal, "group", 2).tolist() == [1, 0, 7, 6, 5, 4, 3, 2]
    assert column_order(diagonal, "group", 8).tolist() == column_order(diagonal, "static", 8).tolist()
    assert column_order(diagonal, "none", 2).tolist() == list(range(8))


@pytest.mark.parametrize("act_order", ["none", "static", "group", "dynamic"])
def test_loss_is_half_the_trace_of_dw_h_dw(act_order):
    weight, _, hessian = problem(dtype=torch.float64)
    tensor, row = quantize_weight(weight, hessian, SCHEMES[0], observer=MinMax(), act_order=act_order)
    damped = hessian + torch.eye(64, dtype=torch.float64) * row["damping"] * hessian.diagonal().mean()
    groups = consecutive(64, 2) if tensor.g_idx is None else tensor.g_idx
    change = tensor.codes.double() * tensor.scale.double()[:, groups.long()] - weight
    assert (tensor.g_idx is None) == (act_order != "dynamic")
    assert row["loss"] == pytest.approx(float(((change @ damped) * change).sum() / 2), rel=1e-12)


def unequal_inputs(tokens=400):
    """Inputs, those of the full-precision model, and what the solver hears of them."""
    weight, x, hessian = problem(rows=48, tokens=tokens, dtype=torch.float64)
    full = x + 0.3 * x @ torch.randn(64, 64, dtype=torch.float64).div(8) + 0.05 * torch.randn_like(x)
    cross = torch.zeros(64, 64, dtype=torch.float64)
    accumulate_cross(cross, full, x)
    return weight, x, full, hessian, cross


def test_what_is_heard_are_the_products_of_their_equations():
    """The cross matrix has the Hessian's factor: without it, another share of the difference would be made up for."""
    _, x, full, hessian, cross = unequal_inputs()
    assert torch.allclose(hessian, 2 * x.T @ x, rtol=1e-12, atol=1e-9)
    assert torch.allclose(cross, 2 * (full - x).T @ x, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("asymmetry", [0.25, 1.0])
def test_asymmetry_is_the_share_of_gptaqs_product_that_is_added_before_rounding(asymmetry):
    weight, _, _, hessian, cross = unequal_inputs()
    factor, _, _ = inverse_factor(hessian, 0.01)
    moved = weight + asymmetry * weight @ torch.triu(cross @ factor.T, 1) @ factor
    knobs = {"observer": MinMax(), "act_order": "none", "groups": "current"}  # ranges are of what is rounded
    found, _ = quantize_weight(weight, hessian, scheme(4), cross_II=cross, asymmetry=asymmetry, **knobs)
    expected, _ = quantize_weight(moved, hessian, scheme(4), **knobs)
    assert torch.equal(found.codes, expected.codes)
    assert torch.equal(found.scale, expected.scale)
    assert not torch.equal(found.codes, quantize_weight(weight, hessian, scheme(4), **knobs)[0].codes)


def test_asymmetry_makes_up_for_inputs_that_differ():
    """GPTAQ's aim: `W x_full` from quantized weights and the inputs that there are."""
    weight, x, full, hessian, cross = unequal_inputs()
    errors = []
    for asymmetry in (0.0, 0.5, 1.0):
        tensor, _ = quantize_weight(
            weight, hessian, scheme(4), observer=MinMax(), cross_II=cross, asymmetry=asymmetry, act_order="none"
        )
        errors.append(float((x @ tensor.dequantize(torch.float32).double().T - full @ weight.T).square().mean()))
    assert errors[2] < errors[1] < errors[0]


def test_asymmetry_is_gptaqs_recurrence_without_rounding():
    """The paper's loop, with nothing rounded: each column hands `w P` to those after it."""
    weight, _, _, hessian, cross = unequal_inputs()
    factor, _, _ = inverse_factor(hessian, 0.01)
    P = torch.triu(cross @ factor.T, 1) @ factor
    rest = weight.clone()
    for c in range(64):
        rest[:, c:] += weight[:, c : c + 1] @ P[c : c + 1, c:]
    assert torch.allclose(weight + weight @ unequal(cross, factor), rest, rtol=1e-12, atol=1e-14)


def test_equal_inputs_need_no_asymmetry():
    weight, _, hessian = problem(dtype=torch.float64)
    zero = torch.zeros_like(hessian)
    with_it = quantize_weight(weight, hessian, scheme(3), observer=MinMax(), cross_II=zero, asymmetry=1.0)[0]
    assert torch.equal(with_it.codes, quantize_weight(weight, hessian, scheme(3), observer=MinMax())[0].codes)


@pytest.mark.parametrize("act_order", ["none", "static", "group", "dynamic"])
@pytest.mark.parametrize("observer", [MinMax(), MSE(10)])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_law_c_white_inputs_give_rtn(scheme, act_order, observer):
    weight, _, _ = problem()
    hessian = torch.eye(64) * 3.7
    tensor, _ = quantize_weight(weight, hessian, scheme, observer=observer, act_order=act_order)
    scale, zero_point = observer.qparams(weight, scheme, torch.bfloat16)
    assert torch.equal(tensor.codes, quantize(weight, scale, zero_point, scheme.grid))
    assert torch.equal(tensor.scale, scale)
    assert tensor.g_idx is None  # nothing tells columns apart, so they stay where they are


@pytest.mark.parametrize("asymmetry", [0.0, 0.5])
@pytest.mark.parametrize("groups", ["static", "current", "stale"])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_dynamic_is_the_plain_algorithm_on_a_permuted_problem(scheme, groups, asymmetry):
    """W and H permuted by activation energy, columns from left to right, and the codes put back."""
    weight, _, _, hessian, cross = unequal_inputs()
    order = hessian.diagonal().argsort(descending=True)
    knobs = {"observer": MinMax(), "groups": groups, "block_size": 24, "asymmetry": asymmetry}
    tensor, row = quantize_weight(weight, hessian, scheme, act_order="dynamic", cross_II=cross, **knobs)
    moved = [m[order][:, order] for m in (hessian, cross)]
    plain, plain_row = quantize_weight(weight[:, order], moved[0], scheme, act_order="none", cross_II=moved[1], **knobs)
    assert torch.equal(tensor.codes[:, order], plain.codes)
    assert torch.equal(tensor.scale, plain.scale)
    assert scheme.symmetric or torch.equal(tensor.zero_point, plain.zero_point)
    assert torch.equal(tensor.dequantize(torch.float32)[:, order], plain.dequantize(torch.float32))
    assert row == plain_row


@pytest.mark.parametrize("groups", ["static", "current"])
@pytest.mark.parametrize(("bits", "size", "columns"), [(4, 32, 64), (3, 16, 96), (2, 8, 40), (8, 64, 64)])
def test_dynamic_does_not_ask_where_an_in_feature_stands(bits, size, columns, groups):
    weight, _, hessian = problem(columns=columns, seed=bits, dtype=torch.float64)
    permutation, s = torch.randperm(columns), Scheme(IntGrid(bits), PerGroup(size), symmetric=bits % 2 == 0)
    knobs = {"observer": MinMax(), "act_order": "dynamic", "groups": groups}
    tensor, _ = quantize_weight(weight, hessian, s, **knobs)
    moved, _ = quantize_weight(weight[:, permutation], hessian[permutation][:, permutation], s, **knobs)
    assert torch.equal(moved.codes, tensor.codes[:, permutation])
    assert torch.equal(moved.scale, tensor.scale)
    assert torch.equal(moved.dequantize(torch.float32), tensor.dequantize(torch.float32)[:, permutation])


def test_keeps_the_output_better_than_rtn():
    weight, x, hessian = problem(rows=64)
    for bits in (2, 3, 4):
        s = scheme(bits)
        tensor, _ = quantize_weight(weight, hessian, s, observer=MinMax())
        scale, _ = MinMax().qparams(weight, s, torch.bfloat16)
        nearest = quantize(weight, scale, None, s.grid).float().view(64, 2, 32) * scale.float()[..., None]
        error = [(x @ (w - weight).T).square().mean() for w in (tensor.dequantize(torch.float32), nearest.view(64, 64))]
        assert error[0] < 0.7 * error[1]


def test_permuting_in_features_permutes_codes_under_act_order():
    weight, _, hessian = problem()
    s = Scheme(IntGrid(3), PerChannel())
    permutation = torch.randperm(64)
    codes = quantize_weight(weight, hessian, s, observer=MinMax())[0].codes
    moved = quantize_weight(weight[:, permutation], hessian[permutation][:, permutation], s, observer=MinMax())[0].codes
    assert (moved != codes[:, permutation]).float().mean() < 0.002


def test_a_rank_deficient_hessian_is_damped_and_a_dead_column_rounds_to_nearest():
    weight, _, _ = problem()
    x = torch.randn(3, 64)
    x[:, 5] = 0
    hessian = torch.zeros(64, 64)
    accumulate_hessian(hessian, x)
    tensor, row = quantize_weight(weight, hessian, SCHEMES[0], observer=MinMax())
    assert row["fallback"] is None
    scale, _ = MinMax().qparams(weight, SCHEMES[0], torch.bfloat16)
    assert torch.equal(tensor.codes[:, 5], quantize(weight, scale, None, SCHEMES[0].grid)[:, 5])


def test_without_any_factor_it_falls_back_to_rtn_and_says_so():
    weight, _, _ = problem()
    indefinite = torch.eye(64)
    indefinite[0, 1] = indefinite[1, 0] = 50.0
    assert inverse_factor(indefinite, 0.01)[0] is None
    tensor, row = quantize_weight(weight, indefinite, SCHEMES[0], observer=MinMax())
    scale, _ = MinMax().qparams(weight, SCHEMES[0], torch.bfloat16)
    assert torch.equal(tensor.codes, quantize(weight, scale, None, SCHEMES[0].grid))
    assert "no Cholesky factor at damping 1.0" in row["fallback"]


def test_a_fallback_makes_up_for_no_inputs_either():
    """Under GPTAQ, too, it is round to nearest: without a factor nobody knows what to hand on."""
    weight, _, _, _, cross = unequal_inputs()
    knobs = {"observer": MinMax(), "cross_II": cross, "asymmetry": 1.0}
    tensor, row = quantize_weight(weight, torch.zeros(64, 64).double(), SCHEMES[0], **knobs)
    scale, _ = MinMax().qparams(weight, SCHEMES[0], torch.bfloat16)
    assert row["fallback"]
    assert torch.equal(tensor.codes, quantize(weight, scale, None, SCHEMES[0].grid))


def test_a_zero_hessian_is_a_reported_fallback():
    weight, _, _ = problem()
    tensor, row = quantize_weight(weight, torch.zeros(64, 64), SCHEMES[0], observer=MinMax())
    scale, _ = MinMax().qparams(weight, SCHEMES[0], torch.bfloat16)
    assert torch.equal(tensor.codes, quantize(weight, scale, None, SCHEMES[0].grid))
    assert "the Hessian is zero" in row["fallback"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(3, 3), (3, 5)])
def test_a_hessian_that_is_not_finite_is_a_reported_fallback(place, bad):
    weight, _, hessian = problem()
    hessian[place] = bad
    tensor, row = quantize_weight(weight, hessian, SCHEMES[0], observer=MinMax(), act_order="none")
    scale, _ = MinMax().qparams(weight, SCHEMES[0], torch.bfloat16)
    assert torch.equal(tensor.codes, quantize(weight, scale, None, SCHEMES[0].grid))
    assert "the Hessian is not finite" in row["fallback"]


@pytest.mark.parametrize("tokens", [1, 2, 31])
def test_a_rank_deficient_hessian_keeps_the_output_at_least_as_well_as_rtn(tokens):
    """Fewer tokens than columns: what they do not say is left to the damping, and no code is wild."""
    weight, x, hessian = problem(rows=64, tokens=tokens)
    tensor, row = quantize_weight(weight, hessian, scheme(4), observer=MinMax())
    assert int(torch.linalg.matrix_rank(hessian)) == tokens
    assert row["fallback"] is None
    scale, _ = MinMax().qparams(weight, scheme(4), torch.bfloat16)
    nearest = quantize(weight, scale, None, scheme(4).grid).float().view(64, 2, 32) * scale.float()[..., None]
    error = [(x @ (w - weight).T).square().mean() for w in (tensor.dequantize(torch.float32), nearest.view(64, 64))]
    assert error[0] < 0.7 * error[1]
    assert float((tensor.dequantize(torch.float32) - weight).norm()) < 2 * float((nearest.view(64, 64) - weight).norm())


def test_a_weight_or_a_correction_that_is_not_finite_is_an_error():
    weight, _, hessian = problem()
    broken = weight.clone()
    broken[2, 3] = float("nan")
    for groups in ("static", "current"):
        with pytest.raises(ValueError, match="not finite"):
            quantize_weight(broken, hessian, SCHEMES[0], observer=MinMax(), act_order="none", groups=groups)
    cross = torch.full_like(hessian, float("inf"))
    with pytest.raises(ValueError, match=r"corrections grew beyond torch\.float32 at damping 0\.01; raise damping"):
        quantize_weight(weight, hessian, SCHEMES[0], observer=MinMax(), cross_II=cross, asymmetry=1.0)


class Live(TorchDispatchMode):
    """How many fp64 matrices live at once."""

    def __init__(self):
        super().__init__()
        self.most, self._alive = 0, weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for part in result if isinstance(result, tuple | list) else (result,):
            if isinstance(part, torch.Tensor) and part.dim() == 2 and part.dtype == torch.float64:
                self._alive.add(part.untyped_storage())
        self.most = max(self.most, len(self._alive))
        return result


@pytest.mark.parametrize("dead", [False, True])
def test_the_factor_is_that_of_its_definition_and_takes_two_matrices_at_once(dead):
    """Bit for bit; of 14336 columns each copy in fp64 takes 1.6 GB."""
    _, _, hessian = problem()
    if dead:
        hessian[3], hessian[:, 3] = 0, 0
    diagonal, mean = hessian.double().diagonal(), hessian.double().diagonal().mean()
    damped = hessian.double() + torch.diag((diagonal == 0).double() * mean) + torch.eye(64).double() * (0.02 * mean)
    expected = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
    with Live() as live:
        factor, _, _ = inverse_factor(hessian, 0.02)
    assert torch.equal(factor, expected)
    assert live.most == 2


def test_damping_escalates_before_giving_up():
    hessian = torch.eye(64)
    hessian[0, 1] = hessian[1, 0] = 1.05  # indefinite by a little
    factor, damping, failure = inverse_factor(hessian, 0.01)
    assert factor is not None
    assert failure is None
    assert damping == pytest.approx(0.1)


@pytest.mark.parametrize(
    "knob",
    [{"damping": float("nan")}, {"damping": -0.5}, {"damping": float("inf")}, {"block_size": 0}, {"asymmetry": -1}],
)
def test_numbers_that_would_never_end_or_be_replaced_are_refused(knob):
    weight, hessian = torch.randn(4, 64), torch.eye(64)
    ((name, value),) = knob.items()
    with pytest.raises(ValueError, match=f"^{name}={value}: a finite number"):
        quantize_weight(weight, hessian, SCHEMES[0], observer=MinMax(), **knob)
