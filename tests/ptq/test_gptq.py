"""GPTQ on models: what each linear sees, what is solved together, what comes out."""

import copy

import pytest
import torch
from tiny import recipe, scheme, tiny

from qat.kernels import gram
from qat.nn.observers.minmax import MinMax
from qat.numerics.granularity import PerChannel, PerGroup, PerTensor
from qat.numerics.grid import IntGrid
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme
from qat.ptq.gptq import gptq
from qat.ptq.gptq_solver import (
    accumulate_cross,
    accumulate_hessian,
    quantize_weight,
)
from qat.ptq.rtn import rtn
from qat.surgery.convert import apply


def test_columns_of_a_group_that_are_taken_apart_have_no_current_range():
    with pytest.raises(ValueError, match=r"groups=current: with act_order=static .* act_order=group"):
        gptq(tiny(), recipe(), [], observer=MinMax(), act_order="static", groups="current")
    with pytest.raises(ValueError, match=r"act_order=weight: one of none, static, group, dynamic"):
        gptq(tiny(), recipe(), [], observer=MinMax(), act_order="weight")


def test_dynamic_groups_are_those_of_the_input_and_their_weights_are_closer():
    """Linears of one input have one g_idx; at 3 bits the output is better kept than by consecutive groups' ranges."""
    model, batches = tiny(), list(torch.randint(0, 256, (4, 24)).split(2))
    changes = gptq(model, recipe(3), batches, observer=MinMax(), act_order="dynamic", groups="current")
    places = {name: tensor.g_idx for name, tensor in changes.tensors.items()}
    assert len(places) == 14
    assert all(torch.equal(g_idx.sort().values, torch.arange(len(g_idx)) // 32) for g_idx in places.values())
    attention = [places[f"model.layers.1.self_attn.{part}_proj"] for part in "qkvo"]
    assert torch.equal(attention[0], attention[1])
    assert torch.equal(attention[0], attention[2])
    assert not torch.equal(attention[0], attention[3])
    storages = {g_idx.data_ptr() for g_idx in places.values()}
    assert len(storages) == 14  # each can be saved
    nearest = apply(model, rtn(model, recipe(3), [], observer=MinMax()).tensors, {})
    full, one, other = (m(input_ids=batches[0]).logits for m in (model, apply(model, changes.tensors, {}), nearest))
    assert (one - full).square().mean() < (other - full).square().mean()


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
def test_asymmetry_hears_the_full_precision_models_inputs():
    """Of o_proj: attention over quantized q, k and v, and over those of the full-precision model."""
    model, batches, heard = tiny(layers=1), [torch.randint(0, 256, (4, 24))], []
    changes = gptq(model, recipe(2), batches, observer=MinMax(), asymmetry=0.5)
    partial = apply(model, {n: t for n, t in changes.tensors.items() if n.split("_proj")[0][-1] in "qkv"}, {})
    for each in (partial, model):
        o_proj = each.model.layers[0].self_attn.o_proj
        hook = o_proj.register_forward_pre_hook(lambda _, args: heard.append(args[0].reshape(-1, 64)))
        each(input_ids=batches[0])
        hook.remove()
    hessian, cross = torch.zeros(2, 64, 64)
    accumulate_hessian(hessian, heard[0])
    accumulate_cross(cross, heard[1], heard[0])
    assert float(cross.norm()) > 0.1 * float(hessian.norm())
    knobs = {"observer": MinMax(), "cross_II": cross, "asymmetry": 0.5}
    expected, _ = quantize_weight(o_proj.weight, hessian, scheme(2), **knobs)
    assert torch.equal(changes.tensors["model.layers.0.self_attn.o_proj"].codes, expected.codes)
    plain = gptq(model, recipe(2), batches, observer=MinMax())
    assert not torch.equal(plain.tensors["model.layers.0.self_attn.o_proj"].codes, expected.codes)


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


@pytest.mark.parametrize("asymmetry", [0.0, 0.25])
def test_exact_products_summed_on_tensor_cores_are_as_good_as_fp32(monkeypatch, asymmetry):
    """Sums in another order: the first stage's codes are the same but for a weight or two at a boundary; such a weight
    changes what the stages behind it see, and bf16 spreads that to many of their codes. The losses stay."""
    model, batches = tiny(layers=1).bfloat16(), list(torch.randint(0, 256, (8, 64)).split(2))
    plain = gptq(model, recipe(3), batches, observer=MinMax(), asymmetry=asymmetry)
    mm, calls = torch.mm, []

    def cores(a, b, out_dtype):
        assert a.dtype == b.dtype == torch.bfloat16
        calls.append(out_dtype)
        return mm(a.to(out_dtype).flip(0, 1), b.to(out_dtype).flip(0)).flip(0)

    monkeypatch.setattr(gram, "_exact", lambda total, a, b: True)
    monkeypatch.setattr(torch, "mm", cores)
    other = gptq(model, recipe(3), batches, observer=MinMax(), asymmetry=asymmetry)
    assert calls == [torch.float32] * (4 * 4 * (3 if asymmetry else 1))  # stages, batches, products
    for name in (f"model.layers.0.self_attn.{part}_proj" for part in "qkv"):
        assert float((plain.tensors[name].codes == other.tensors[name].codes).float().mean()) > 0.999
    losses = [[row["loss"] for row in found.layers] for found in (plain, other)]
    assert losses[1] == pytest.approx(losses[0], rel=0.05)


def test_calibration_that_is_not_finite_is_an_error_with_a_name():
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(1e38)
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.down_proj: not finite on the calibration data"):
        gptq(model, Recipe({"l": Rule(".*down_proj", scheme())}), [torch.randint(0, 256, (1, 8))], observer=MinMax())


def test_an_unknown_family_is_refused():
    model = tiny()
    model.config.model_type = "mamba"
    with pytest.raises(ValueError, match="'mamba' is not described"):
        gptq(model, recipe(), [], observer=MinMax())


@pytest.mark.parametrize("asymmetry", [0.0, 0.25])
def test_linears_that_get_nothing_but_zeros_are_rounded_to_nearest_and_reported(asymmetry):
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.zero_()
    changes = gptq(model, recipe(3), [torch.randint(0, 256, (2, 24))], observer=MinMax(), asymmetry=asymmetry)
    nearest = rtn(model, recipe(3), [], observer=MinMax()).tensors
    dead = {f"model.layers.1.self_attn.{part}_proj" for part in "qkvo"}
    assert {row["name"] for row in changes.layers if row["fallback"]} == dead
    assert {row["fallback"] for row in changes.layers} == {None, "the Hessian is zero: calibration never excites it"}
    for name in dead:
        assert torch.equal(changes.tensors[name].codes, nearest[name].codes)
        assert torch.equal(changes.tensors[name].scale, nearest[name].scale)


@pytest.mark.parametrize("asymmetry", [0.0, 0.25])
def test_a_linear_that_no_token_reaches_is_rounded_to_nearest_and_reported(monkeypatch, asymmetry):
    """As an expert to which nothing is routed: the block computes without it."""
    model = tiny(layers=1)
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", lambda self, x: self.down_proj(self.up_proj(x)))
    rules = Recipe({"gate": Rule(".*gate_proj", scheme(3))})
    changes = gptq(model, rules, [torch.randint(0, 256, (2, 24))], observer=MinMax(), asymmetry=asymmetry)
    (row,) = changes.layers
    assert "calibration never excites it" in row["fallback"]
    nearest = rtn(model, rules, [], observer=MinMax()).tensors[row["name"]]
    assert torch.equal(changes.tensors[row["name"]].codes, nearest.codes)


def test_what_one_stream_alone_reaches_says_nothing(monkeypatch):
    """As an expert to which the full-precision stream routes tokens, and the quantized one none."""
    model, called = tiny(layers=1), []

    def forward(self, x):
        called.append(self)
        if len(called) % 2 == 0:  # the second of each pair: the full-precision one
            self.gate_proj(x)
        return self.down_proj(self.up_proj(x))

    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", forward)
    rules = Recipe({"gate": Rule(".*gate_proj", scheme(3))})
    changes = gptq(model, rules, [torch.randint(0, 256, (2, 24))], observer=MinMax(), asymmetry=0.25)
    assert len(called) >= 2
    assert "calibration never excites it" in changes.layers[0]["fallback"]


def test_an_error_in_a_linear_has_its_name():
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[0, 0] = 3e38  # finite; its scale is not, in half
    batches = [torch.randint(0, 256, (1, 8))]
    with pytest.raises(ValueError, match=r"^model\.layers\.1\.mlp\.down_proj: a scale is not finite"):
        gptq(model, recipe(), batches, observer=MinMax(), dtype=torch.float16)
