"""GPTQ against a naive implementation of its definition, and the laws that it must obey."""

import copy

import pytest
import torch
from tiny import recipe, scheme, tiny

from qat.nn.observers.minmax import MinMax
from qat.nn.observers.mse import MSE
from qat.numerics.affine import qparams, quantize, ranges
from qat.numerics.granularity import PerChannel, PerGroup, PerTensor
from qat.numerics.grid import IntGrid
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme
from qat.ptq.gptq import accumulate_hessian, gptq, inverse_factor, quantize_weight
from qat.ptq.rtn import rtn
from qat.surgery.convert import apply

SCHEMES = [
    Scheme(IntGrid(4), PerGroup(32)),
    Scheme(IntGrid(3), PerGroup(16), symmetric=False),
    Scheme(IntGrid(2), PerChannel()),
    Scheme(IntGrid(8), PerTensor()),
]


def problem(rows=24, columns=64, tokens=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * 0.3 + torch.eye(columns)
    x = torch.randn(tokens, columns, generator=generator) @ mixing
    hessian = torch.zeros(columns, columns)
    accumulate_hessian(hessian, x)
    return torch.randn(rows, columns, generator=generator) * 0.05, x, hessian


def naive(weight, hessian, scheme, act_order, damping=0.01):
    """Optimal brain quantization with an explicit inverse, one column removed at a time, in fp64."""
    scale, zero_point = qparams(*ranges(weight, scheme), scheme, torch.bfloat16)
    columns = weight.shape[1]
    damped = hessian.double() + torch.eye(columns, dtype=torch.float64) * damping * hessian.double().diagonal().mean()
    inverse, rest = torch.linalg.inv(damped), weight.double().clone()
    order = hessian.diagonal().argsort(descending=True, stable=True).tolist() if act_order else range(columns)
    result, left = torch.empty_like(rest), list(range(columns))
    codes = torch.empty_like(weight, dtype=torch.int8)
    for c in order:
        codes[:, c] = quantize(rest.float(), scale, zero_point, scheme.grid)[:, c]
        grouped = codes.float().reshape(*scale.shape, -1) - (0 if zero_point is None else zero_point.float()[..., None])
        result[:, c] = (grouped * scale.float()[..., None]).reshape(weight.shape)[:, c].double()
        error = (rest[:, c] - result[:, c]) / inverse[c, c]
        rest[:, left] -= error[:, None] * inverse[c, left]
        left.remove(c)
        inverse = inverse - inverse[:, c : c + 1] @ inverse[c : c + 1] / inverse[c, c]
    return codes, result


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_equals_optimal_brain_quantization(scheme, act_order):
    weight, _, hessian = problem()
    tensor, row = quantize_weight(weight, hessian, scheme, observer=MinMax(), act_order=act_order)
    codes, _ = naive(weight, hessian, scheme, act_order)
    assert (tensor.codes != codes).float().mean() < 0.005  # fp32 against fp64: only values within rounding of a tie
    assert row["fallback"] is None


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_codes_do_not_depend_on_the_block_size(scheme):
    weight, _, hessian = problem()
    codes = [
        quantize_weight(weight, hessian, scheme, observer=MinMax(), block_size=size)[0].codes
        for size in (1, 32, 128, 64)
    ]
    assert all((c != codes[0]).float().mean() < 0.002 for c in codes[1:])


def test_loss_is_half_the_trace_of_dw_h_dw():
    weight, _, hessian = problem()
    tensor, row = quantize_weight(weight, hessian, SCHEMES[0], observer=MinMax())
    damped = hessian.double() + torch.eye(64, dtype=torch.float64) * row["damping"] * hessian.double().diagonal().mean()
    change = tensor.dequantize(torch.float32).double() - weight.double()
    assert row["loss"] == pytest.approx(float(((change @ damped) * change).sum() / 2), rel=1e-4)


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("observer", [MinMax(), MSE(10)])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_law_c_white_inputs_give_rtn(scheme, act_order, observer):
    weight, _, _ = problem()
    hessian = torch.eye(64) * 3.7
    tensor, _ = quantize_weight(weight, hessian, scheme, observer=observer, act_order=act_order)
    scale, zero_point = observer.qparams(weight, scheme, torch.bfloat16)
    assert torch.equal(tensor.codes, quantize(weight, scale, zero_point, scheme.grid))
    assert torch.equal(tensor.scale, scale)


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


def test_damping_escalates_before_giving_up():
    hessian = torch.eye(64)
    hessian[0, 1] = hessian[1, 0] = 1.05  # indefinite by a little
    factor, damping, failure = inverse_factor(hessian, 0.01)
    assert factor is not None
    assert failure is None
    assert damping == pytest.approx(0.1)


def test_on_a_model_every_linear_is_done_and_the_model_is_left_alone():
    model = tiny()
    before = copy.deepcopy(model.state_dict())
    batches = list(torch.randint(0, 256, (4, 24)).split(2))
    seen = []
    changes = gptq(model, recipe(3), batches, observer=MinMax(), progress=lambda i, n: seen.append((i, n)))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert seen == [(1, 2), (2, 2)]
    assert len(changes.tensors) == 14
    assert not changes.folded
    ids = torch.cat(batches)
    nearest = apply(model, rtn(model, recipe(3), [], observer=MinMax()).tensors, {})
    full, one, other = (m(input_ids=ids).logits for m in (model, apply(model, changes.tensors, {}), nearest))
    assert (one - full).square().mean() < (other - full).square().mean()


@torch.no_grad()
def test_later_linears_see_quantized_predecessors():
    """True-sequential: the Hessian of o_proj comes from quantized q, k and v."""
    model = tiny(layers=1)
    batches = [torch.randint(0, 256, (4, 24))]
    changes = gptq(model, recipe(2), batches, observer=MinMax())
    partial = apply(model, {n: t for n, t in changes.tensors.items() if n.split("_proj")[0][-1] in "qkv"}, {})
    hessian = torch.zeros(64, 64)
    o_proj = partial.model.layers[0].self_attn.o_proj
    o_proj.register_forward_pre_hook(lambda _, args: accumulate_hessian(hessian, args[0].reshape(-1, 64)))
    partial(input_ids=batches[0])
    expected, _ = quantize_weight(o_proj.weight, hessian, scheme(2), observer=MinMax())
    assert torch.equal(changes.tensors["model.layers.0.self_attn.o_proj"].codes, expected.codes)


@torch.no_grad()
@pytest.mark.parametrize("granularity", [PerGroup(32), PerChannel(), PerTensor()], ids=str)
def test_linears_that_share_their_input_are_solved_as_if_alone(granularity):
    """Together where they share a scheme, with codes, scales, zeros and losses of their own."""
    model, batches = tiny(layers=1), [torch.randint(0, 256, (4, 24))]
    own, other = (Scheme(IntGrid(bits), granularity, symmetric=False) for bits in (3, 4))
    rules = {"l": Rule(".*_proj", own), "k": Rule(".*k_proj", other)}
    changes = gptq(model, Recipe(rules), batches, observer=MinMax())
    hessian, attention = torch.zeros(64, 64), model.model.layers[0].self_attn
    hook = attention.q_proj.register_forward_pre_hook(
        lambda _, args: accumulate_hessian(hessian, args[0].reshape(-1, 64))
    )
    model(input_ids=batches[0])
    hook.remove()
    losses = {row["name"]: row["loss"] for row in changes.layers}
    for name, wanted in (("q_proj", own), ("k_proj", other), ("v_proj", own)):
        full = f"model.layers.0.self_attn.{name}"
        alone, row = quantize_weight(getattr(attention, name).weight, hessian, wanted, observer=MinMax())
        found = changes.tensors[full]
        assert (found.scheme, found.shape) == (wanted, alone.shape)
        for part in ("codes", "scale", "zero_point"):
            assert torch.equal(getattr(found, part), getattr(alone, part)), (name, part)
        assert losses[full] == pytest.approx(row["loss"], rel=1e-9)


def test_calibration_that_is_not_finite_is_an_error_with_a_name():
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(1e38)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj: its inputs are not finite"):
        gptq(model, Recipe({"l": Rule(".*down_proj", scheme())}), [torch.randint(0, 256, (1, 8))], observer=MinMax())


def test_an_unknown_family_is_refused():
    model = tiny()
    model.config.model_type = "mamba"
    with pytest.raises(ValueError, match="'mamba' is not described"):
        gptq(model, recipe(), [], observer=MinMax())
