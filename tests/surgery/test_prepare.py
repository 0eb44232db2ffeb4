import copy

import pytest
import torch
from tiny import recipe, scheme, tiny

from qat.nn.estimators import LSQ, StraightThrough
from qat.nn.fake_quantize import Phase
from qat.nn.linear import QATLinear
from qat.nn.observers.minmax import MinMax
from qat.numerics.affine import rtn
from qat.numerics.granularity import PerToken
from qat.numerics.grid import IntGrid
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme
from qat.ptq.rtn import rtn as rtn_method
from qat.surgery.convert import apply
from qat.surgery.prepare import fake_quants, prepare, set_phase

IDS = torch.arange(24).view(2, 12)


def test_a_prepared_model_computes_what_rtn_serves():
    model, student = tiny(), tiny()
    prepare(student, recipe(3), MinMax(), LSQ())
    served = apply(model, rtn_method(model, recipe(3), [], observer=MinMax()).tensors, {})
    assert torch.equal(student(input_ids=IDS).logits, served(input_ids=IDS).logits)


def test_switched_off_it_is_the_model_itself():
    model, student = tiny(), tiny()
    prepare(student, recipe(), MinMax(), LSQ())
    set_phase(student, Phase.OFF)
    assert torch.equal(student(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_linears_norms_and_scales_train_and_embeddings_do_not():
    student = tiny()
    prepare(student, recipe(), MinMax(), LSQ())
    names = [n for n, p in student.named_parameters() if p.requires_grad]
    assert not [n for n in names if "embed" in n]
    assert len([n for n in names if n.endswith("log_step")]) == 14
    assert len([n for n in names if "norm" in n]) == 5
    assert len([n for n in names if n.endswith("_proj.weight")]) == 14
    student(input_ids=IDS).logits.square().mean().backward()
    assert [n for n, p in student.named_parameters() if p.requires_grad and p.grad is None] == []


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_train_if_asked_and_stay_tied(tied):
    student = tiny(tied=tied)
    prepare(student, recipe(), MinMax(), LSQ(), train_embeddings=True)
    masters = {id(p) for n, p in student.named_parameters() if "embed" in n or "head" in n}
    assert len(masters) == (1 if tied else 2)
    student(input_ids=IDS).logits.square().mean().backward()
    assert student.get_input_embeddings().weight.requires_grad


def test_unquantized_tensors_enter_rounded_and_their_masters_stay_exact():
    student = tiny()
    prepare(student, recipe(), MinMax(), LSQ())
    norm = student.model.norm
    with torch.no_grad():
        norm.parametrizations.weight.original.add_(1e-4)
    assert torch.equal(norm.weight, norm.weight.bfloat16().float())
    assert not torch.equal(norm.weight, norm.parametrizations.weight.original)


@pytest.mark.parametrize(("estimator", "phase"), [(LSQ(), Phase.LEARN), (StraightThrough(), Phase.FROZEN)])
def test_scales_start_at_those_of_the_weights(estimator, phase):
    model, student = tiny(), tiny()
    prepare(student, recipe(), MinMax(), estimator)
    for name, linear in fake_quants(student).items():
        assert linear.weight_fake_quant.phase is phase
        _, scale, _ = rtn(model.get_parameter(f"{name}.weight").detach(), scheme(), torch.bfloat16)
        assert torch.equal(linear.weight_fake_quant.qparams()[0], scale)


def test_inputs_are_quantized_where_the_recipe_says():
    token = Scheme(IntGrid(8), PerToken(), dynamic=True)
    student = tiny()
    prepare(student, Recipe({"a": Rule(".*down_proj", scheme(), token)}), MinMax(), LSQ())
    assert isinstance(student.model.layers[0].mlp.down_proj, QATLinear)
    assert student.model.layers[0].mlp.down_proj.input_fake_quant is not None
    assert not isinstance(student.model.layers[0].mlp.up_proj, QATLinear)


def test_masters_that_are_not_fp32_and_static_inputs_are_refused():
    with pytest.raises(ValueError, match=r"torch.bfloat16; masters are fp32"):
        prepare(tiny().bfloat16(), recipe(), MinMax(), LSQ())
    static = Recipe({"a": Rule(".*_proj", scheme(), Scheme(IntGrid(8), PerToken(), dynamic=True))})
    object.__setattr__(static.rules["a"].input, "dynamic", False)
    with pytest.raises(ValueError, match="is static; set dynamic=true"):
        prepare(tiny(), static, MinMax(), LSQ())


def test_a_weight_that_is_not_finite_is_named_before_training():
    student = tiny()
    with torch.no_grad():
        student.model.layers[1].mlp.gate_proj.weight[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.gate_proj: a scale is not finite"):
        prepare(student, recipe(), MinMax(), LSQ())


def test_a_prepared_model_can_be_copied():
    student = tiny()
    prepare(student, recipe(), MinMax(), LSQ())
    other = copy.deepcopy(student)
    assert torch.equal(other(input_ids=IDS).logits, student(input_ids=IDS).logits)
