import copy

import pytest
import torch
from tiny import embedded, recipe, scheme, tiny
from torch.nn.utils import parametrize

from qat.nn.embedding import QATEmbedding
from qat.nn.estimators import LSQ, SEQ, LSQPlus, StraightThrough
from qat.nn.fake_quantize import Phase
from qat.nn.kv import quantize_kv
from qat.nn.linear import QATLinear
from qat.nn.observers.minmax import MinMax
from qat.numerics.affine import rtn
from qat.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from qat.numerics.grid import Codebook, FloatGrid, IntGrid
from qat.numerics.kv import KINDS
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


@pytest.mark.parametrize("kind", KINDS)
def test_keys_and_values_are_those_that_the_recipe_serves(kind):
    model, student = tiny(), tiny()
    prepare(student, recipe(3, kv=kind), MinMax(), LSQ())
    served = apply(model, rtn_method(model, recipe(3), [], observer=MinMax()).tensors, {})
    assert not torch.equal(student(input_ids=IDS).logits, served(input_ids=IDS).logits)
    quantize_kv(served, KINDS[kind])
    assert torch.equal(student(input_ids=IDS).logits, served(input_ids=IDS).logits)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match=r"recipe\.kv: granularity=PerTensor"):
        prepare(tiny(), Recipe(recipe().rules, Scheme(IntGrid(8), PerTensor())), MinMax(), LSQ())


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


@pytest.mark.parametrize("trains", [True, False])
def test_a_tied_pair_is_one_table_with_one_set_of_scales(trains):
    model, student = tiny(), tiny()
    rules = embedded()
    prepare(student, rules, MinMax(), LSQ(), train_embeddings=trains)
    table, head = student.model.embed_tokens, student.lm_head
    assert (type(table), type(head)) == (QATEmbedding, QATLinear)
    assert table.weight is head.weight
    assert table.weight_fake_quant is head.weight_fake_quant
    assert table.weight_fake_quant.name == "model.embed_tokens"
    assert next(iter(fake_quants(student))) == "model.embed_tokens"
    assert "lm_head" not in fake_quants(student)
    assert table.weight.requires_grad is trains
    assert table.weight_fake_quant.log_step.requires_grad
    served = apply(model, rtn_method(model, rules, [], observer=MinMax()).tensors, {})
    assert torch.equal(student(input_ids=IDS).logits, served(input_ids=IDS).logits)
    set_phase(student, Phase.OFF)
    assert torch.equal(student(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_tied_heads_inputs_are_quantized_where_the_recipe_says():
    weight = embedded().rules["embeddings"].weight
    rules = Recipe(embedded().rules | {"head": Rule("lm_head", weight, TOKEN)})
    model, student = tiny(), tiny()
    prepare(student, rules, MinMax(), LSQ())
    assert student.lm_head.input_fake_quant is not None
    tensors = rtn_method(model, rules, [], observer=MinMax()).tensors
    served = apply(model, tensors, {}, recipe=rules)
    assert torch.equal(student(input_ids=IDS).logits, served(input_ids=IDS).logits)
    assert not torch.equal(served(input_ids=IDS).logits, apply(model, tensors, {})(input_ids=IDS).logits)


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


def test_masters_that_are_not_fp32_are_refused():
    with pytest.raises(ValueError, match=r"torch.bfloat16; masters are fp32"):
        prepare(tiny().bfloat16(), recipe(), MinMax(), LSQ())


NVFP4 = Scheme(FloatGrid("e2m1"), PerGroup(16), scale_dtype="float8_e4m3fn")
MXFP4 = Scheme(FloatGrid("e2m1"), PerGroup(32), scale_dtype="float8_e8m0fnu")
TOKEN = Scheme(IntGrid(8), PerToken(), dynamic=True)


@pytest.mark.parametrize(
    ("weight", "input", "estimator", "input_estimator", "message"),
    [
        (MXFP4, None, LSQ(), None, "powers of two; use estimator=clipped"),
        (scheme(), None, SEQ(), None, "binary, ternary and seq2"),
        (Scheme(Codebook("nf4"), PerGroup(32)), None, SEQ(), None, "binary, ternary and seq2"),
        (scheme(), None, LSQPlus(), None, "set symmetric=false or use estimator=lsq"),
        (scheme(), Scheme(IntGrid(8), PerTensor()), LSQ(), LSQPlus(), "set symmetric=false"),
        (scheme(), Scheme(IntGrid(8), PerGroup(32)), LSQ(), None, "static input scheme"),
        (scheme(), Scheme(IntGrid(8), PerChannel(), dynamic=True), LSQ(), None, "an input has no output channels"),
        (TOKEN, None, LSQ(), None, "set dynamic=false on the weight's scheme"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(weight, input, estimator, input_estimator, message):
    with pytest.raises(ValueError, match=rf"^model\.layers\.0\.mlp\.down_proj: .*{message}"):
        prepare(tiny(1), Recipe({"a": Rule(".*down_proj", weight, input)}), MinMax(), estimator,
                input_estimator=input_estimator)  # fmt: skip


def test_query_key_and_value_share_a_global_scale_and_so_do_gate_and_up():
    student = tiny()
    prepare(student, Recipe({"a": Rule(".*_proj", NVFP4)}), MinMax(), LSQ())
    for layer, original in zip(student.model.layers, tiny().model.layers, strict=True):
        for names in (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)):
            part = "self_attn" if hasattr(layer.self_attn, names[0]) else "mlp"
            modules = [layer.get_submodule(f"{part}.{n}") for n in names]
            amax = max(float(original.get_submodule(f"{part}.{n}").weight.detach().abs().max()) for n in names)
            for module in modules:
                assert float(module.weight_fake_quant.global_scale) == pytest.approx(448 * 6 / amax)


def test_disabled_it_trains_as_plain_linears_do_bit_for_bit():
    """Ten optimizer steps, all parameters."""
    plain, student = tiny(), tiny()
    prepare(student, recipe(), MinMax(), LSQ(), train_embeddings=True)
    set_phase(student, Phase.OFF)
    for norm in [m for m in student.modules() if parametrize.is_parametrized(m)]:
        weight, norm.__class__ = norm.parametrizations.weight.original, type(norm).__base__
        del norm.parametrizations
        norm.register_parameter("weight", weight)
    for model in (plain, student):
        trained = [p for n, p in model.named_parameters() if "_step" not in n]
        optimizer = torch.optim.AdamW(trained, lr=1e-3)
        generator = torch.Generator().manual_seed(1)
        for _ in range(10):
            ids = torch.randint(0, 256, (2, 16), generator=generator)
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    for name, parameter in plain.named_parameters():
        assert torch.equal(student.get_parameter(name), parameter), name
        assert not torch.equal(parameter, tiny().get_parameter(name)), name


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
