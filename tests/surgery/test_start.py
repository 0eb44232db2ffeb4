"""Training starts with exactly the codes that a method found."""

import math

import pytest
import torch
from tiny import embedded, recipe, scattered, scheme, tiny
from tiny_grids import OTHERS

from qat.nn.estimators import LSQ, Clipped, EfficientQAT
from qat.nn.observers.minmax import MinMax
from qat.nn.observers.mse import MSE
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import E8M0
from qat.ptq.awq import awq
from qat.ptq.gptq import gptq
from qat.ptq.rotate import rotate
from qat.ptq.rtn import rtn
from qat.surgery.changes import Changes
from qat.surgery.convert import apply, convert
from qat.surgery.prepare import fake_quants, prepare
from qat.surgery.start import start_from

BATCHES = list(torch.randint(0, 256, (6, 12), generator=torch.Generator().manual_seed(1)).split(2))
IDS = torch.arange(24).view(2, 12)
THREE = scheme(3)
SCHEMES = {"int3": THREE, "asymmetric": scheme(3, symmetric=False)} | {
    name: OTHERS[name] for name in ("nvfp4", "mxfp4", "PerGroup(group_size=16)_nf4", "PerGroup(group_size=16)_seq2")
}


def started(method, rule=THREE):
    model, rules = tiny(), Recipe({"linears": Rule(".*_proj", rule)})
    changes = method(model, rules, BATCHES, observer=MinMax())
    student = tiny()
    estimator = Clipped() if rule.scale_dtype == E8M0 else LSQ()
    prepare(student, rules, MSE(4), estimator)  # other scales than the method's
    start_from(student, changes)
    return model, student, changes


@pytest.mark.parametrize("rule", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("method", [rtn, gptq, awq])
def test_step_0_has_exactly_the_methods_codes(method, rule):
    model, student, changes = started(method, rule)
    tensors, folded = convert(student)
    assert tensors.keys() == changes.tensors.keys()
    for name, tensor in changes.tensors.items():
        assert torch.equal(tensors[name].codes, tensor.codes)
        assert torch.equal(tensors[name].scale, tensor.scale)
        assert rule.symmetric or torch.equal(tensors[name].zero_point, tensor.zero_point)
    assert all(torch.equal(folded[name], value) for name, value in changes.folded.items())
    served = apply(model, changes.tensors, changes.folded)
    assert torch.equal(student(input_ids=IDS).logits, served(input_ids=IDS).logits)


@pytest.mark.parametrize("tied", [True, False])
def test_a_table_that_was_moved_and_does_not_train_is_converted(tied):
    """A rotated embedding is frozen, but it is not the model's."""
    model, student = tiny(tied=tied), tiny(tied=tied)
    for one in (model, student):
        one.model.norm.weight.data.fill_(1.0)
    changes = rotate(model, recipe(3), BATCHES, observer=MinMax())
    assert torch.equal(model.lm_head.weight, student.lm_head.weight)
    prepare(student, recipe(3), MSE(4), LSQ())
    start_from(student, changes)
    tensors, folded = convert(student)
    assert folded.keys() >= changes.folded.keys() >= {"model.embed_tokens.weight"}
    assert all(torch.equal(folded[name], value) for name, value in changes.folded.items())
    assert {folded[name].dtype for name in changes.folded} == {torch.bfloat16}  # `equal` says nothing of dtypes
    served = apply(model, tensors, folded)
    assert torch.equal(student(input_ids=IDS).logits, served(input_ids=IDS).logits)
    student(input_ids=IDS).logits.square().mean().backward()
    assert [name for name, p in student.named_parameters() if p.requires_grad != (p.grad is not None)] == []
    assert not student.model.embed_tokens.parametrizations.weight.original.requires_grad


@pytest.mark.parametrize("method", [rtn, gptq])
def test_a_tied_pair_starts_with_the_methods_codes(method):
    student, rules = tiny(), embedded(scheme(3))
    changes = method(tiny(), rules, BATCHES, observer=MinMax())
    prepare(student, rules, MSE(4), LSQ())
    start_from(student, changes)
    tensors, _ = convert(student)
    assert tensors.keys() == changes.tensors.keys()
    assert all(torch.equal(tensors[name].codes, tensor.codes) for name, tensor in changes.tensors.items())
    served = apply(tiny(), changes.tensors, {})
    assert torch.equal(student(input_ids=IDS).logits, served(input_ids=IDS).logits)


def test_masters_stand_at_the_centres_of_their_cells():
    """So that no code moves before its master has gone half a step."""
    _, student, changes = started(gptq)
    for name, linear in fake_quants(student).items():
        assert torch.equal(linear.weight, changes.tensors[name].dequantize(torch.float32))
        step = changes.tensors[name].scale.float().repeat_interleave(32, 1)
        for nudge in (0.49, -0.49):
            assert torch.equal(
                linear.weight_fake_quant.codes(linear.weight + nudge * step), changes.tensors[name].codes
            )


def test_it_trains_from_there():
    _, student, _ = started(awq)
    student(input_ids=IDS).logits.square().mean().backward()
    assert [name for name, p in student.named_parameters() if p.requires_grad and p.grad is None] == []


def test_zero_points_that_trained_stay_where_they_are_under_an_estimator_that_learns_none():
    rules, first, second = recipe(3, symmetric=False), tiny(), tiny()
    prepare(first, rules, MinMax(), EfficientQAT())
    with torch.no_grad():
        for linear in fake_quants(first).values():
            linear.weight_fake_quant.zero_step.uniform_(-2, 2)
    tensors, folded = convert(first)
    prepare(second, rules, MinMax(), LSQ())
    start_from(second, Changes(tensors, folded, [], first.state_dict()))
    assert torch.equal(first(input_ids=IDS).logits, second(input_ids=IDS).logits)


def test_codes_that_would_be_others_are_found(monkeypatch):
    model, rules = tiny(), recipe(3)
    changes = rtn(model, rules, [], observer=MinMax())
    changes.state["model.layers.0.mlp.up_proj.weight"] = torch.zeros(128, 64)
    student = tiny()
    prepare(student, rules, MinMax(), LSQ())
    with pytest.raises(
        AssertionError, match=r"model\.layers\.0\.mlp\.up_proj: training would not start from the codes"
    ):
        start_from(student, changes)


def test_the_same_codes_on_other_scales_are_found():
    """A master and its scale, both twice as large: no code says so."""
    changes = rtn(tiny(), recipe(3), [], observer=MinMax())
    name, student = "model.layers.0.mlp.up_proj", tiny()
    changes.state[f"{name}.weight"] = 2 * changes.tensors[name].dequantize(torch.float32)
    changes.state[f"{name}.weight_fake_quant.log_step"] = torch.full((128, 2), math.log(2))
    prepare(student, recipe(3), MinMax(), LSQ())
    with pytest.raises(AssertionError, match=r"^model\.layers\.0\.mlp\.up_proj: nor from their scales"):
        start_from(student, changes)


@pytest.mark.parametrize(("part", "name"), [("tensors", "lm_head"), ("folded", "model.nothing.weight")])
def test_changes_of_something_else_are_refused(part, name):
    model, rules = tiny(), recipe(3)
    changes = rtn(model, rules, [], observer=MinMax())
    values = {"tensors": next(iter(changes.tensors.values())), "folded": torch.ones(64)}
    getattr(changes, part)[name] = values[part]
    student = tiny()
    prepare(student, rules, MinMax(), LSQ())
    with pytest.raises(ValueError, match=f"^{name}: "):
        start_from(student, changes)


def test_groups_of_in_features_here_and_there_are_no_place_to_start():
    changes = rtn(tiny(), recipe(), [], observer=MinMax())
    changes.tensors = {name: scattered(tensor) for name, tensor in changes.tensors.items()}
    student = tiny()
    prepare(student, recipe(), MinMax(), LSQ())
    with pytest.raises(ValueError, match=r"^model\.\S+: has a g_idx, .*; start from act_order=group or static"):
        start_from(student, changes)
