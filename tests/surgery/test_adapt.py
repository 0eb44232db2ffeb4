"""A frozen model with adapters: step 0, what trains, what is left alone, what it merges to."""

import copy
from functools import partial

import pytest
import torch
from tiny import recipe, tiny
from torch.nn.utils import parametrize

from qat.kernels.fake_quant import watch
from qat.nn.adapter import LoRA, QLoRA
from qat.nn.estimators import LSQ, Clipped, EfficientQAT
from qat.nn.observers.minmax import MinMax
from qat.nn.qlora import QLoRALinear
from qat.numerics.granularity import PerGroup
from qat.numerics.grid import IntGrid
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme
from qat.ptq.gptq import gptq
from qat.ptq.rtn import rtn
from qat.surgery.adapt import add_lora, merge, prepare_qlora
from qat.surgery.convert import apply, convert
from qat.surgery.prepare import fake_quants, prepare
from qat.surgery.start import start_from

IDS = torch.arange(24).view(2, 12)
LORA, QLORA = LoRA(rank=4, alpha=8), QLoRA(rank=4, alpha=8, group_size=32)


def lora(adapter=LORA, estimator=None, symmetric=True, **options):
    student = tiny()
    prepare(student, recipe(3, symmetric=symmetric), MinMax(), estimator or LSQ(), **options)
    add_lora(student, adapter)
    return student.train()


def qlora(adapter=QLORA, **options):
    student = tiny()
    prepare_qlora(student, recipe(3), adapter, **options)
    return student.train()


def steps(student, count=4, autocast=False, lr=5e-3):
    """A few optimizer steps of what has a gradient."""
    optimizer = torch.optim.AdamW([p for p in student.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        ids = torch.randint(0, 256, (2, 16), generator=generator)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = student(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return student


def trained(student):
    return {name for name, p in student.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("autocast", [False, True])
def test_step_0_is_that_of_plain_qat_bit_for_bit(symmetric, autocast):
    plain = tiny()
    prepare(plain, recipe(3, symmetric=symmetric), MinMax(), LSQ())
    student = lora(symmetric=symmetric)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        outputs = [model(input_ids=IDS, labels=IDS) for model in (plain.train(), student)]
    assert torch.equal(outputs[0].logits, outputs[1].logits)
    for output in outputs:
        output.loss.backward()
    for name, linear in fake_quants(student).items():
        other = plain.get_submodule(name)
        assert torch.equal(linear.weight_fake_quant.log_step.grad, other.weight_fake_quant.log_step.grad)
        assert not bool(linear.adapter.A.grad.any())  # B is 0
        assert bool(linear.adapter.B.grad.any())


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("estimator", [LSQ(), Clipped(), EfficientQAT()], ids=lambda e: type(e).__name__)
def test_after_some_steps_the_merged_codes_are_those_of_training(estimator, autocast):
    """Mismatch 0: every weight that a training forward multiplied with is the dequantized code, bit for bit."""
    symmetric = not isinstance(estimator, EfficientQAT)
    student = steps(lora(estimator=estimator, symmetric=symmetric), autocast=autocast)
    seen = []
    with (
        watch(lambda scale, result, rows: seen.append(result)),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        student(input_ids=IDS)
    with torch.autocast("cpu", torch.bfloat16, enabled=not autocast):  # where it is converted makes no difference
        tensors, folded = convert(student)
    dtype = torch.bfloat16 if autocast else torch.float32
    assert len(seen) == len(tensors) == 14
    for result, (name, tensor) in zip(seen, tensors.items(), strict=True):  # both in the model's order
        assert result.dtype == dtype
        assert torch.equal(result, tensor.dequantize(dtype)), name
    plain = tiny()
    prepare(plain, recipe(3, symmetric=symmetric), MinMax(), estimator)
    assert sum(not torch.equal(t.codes, convert(plain)[0][n].codes) for n, t in tensors.items()) == 14
    served = apply(tiny(), tensors, folded)
    assert torch.equal(served(input_ids=IDS).logits, student.eval()(input_ids=IDS).logits)


def test_a_and_b_and_scales_train_and_nothing_else():
    student, before = lora(), tiny()
    assert {name.rpartition(".")[2] for name in trained(student)} == {"A", "B", "log_step"}
    assert len(trained(student)) == 3 * 14
    steps(student)
    for name, parameter in before.named_parameters():
        owner, _, key = name.rpartition(".")
        module = student.get_submodule(owner)
        own = module.parametrizations[key].original if parametrize.is_parametrized(module) else getattr(module, key)
        assert torch.equal(own, parameter), name
    assert all(bool(linear.adapter.A.grad is None) for linear in fake_quants(student).values())
    assert {n.rpartition(".")[2] for n in trained(lora(estimator=Clipped()))} == {"A", "B"}


def test_norms_and_embeddings_train_if_asked():
    names = trained(lora(LoRA(rank=4, alpha=8, norms=True)))
    assert sum("norm" in name for name in names) == 5
    assert not any("embed" in name for name in names)
    assert any("embed" in name for name in trained(lora(train_embeddings=True)))
    names = trained(qlora(QLoRA(rank=4, alpha=8, group_size=32, norms=True), train_embeddings=True))
    assert sum("norm" in name for name in names) == 5
    assert sum("embed" in name for name in names) == 1


@pytest.mark.parametrize("make", [lora, qlora])
def test_where_a_starts_is_a_function_of_the_seed(make):
    torch.manual_seed(1)
    first = make()
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = make()
    kind = type(LORA) if make is lora else type(QLORA)
    other = make(kind(**({"rank": 4, "alpha": 8, "seed": 5} | ({} if make is lora else {"group_size": 32}))))
    parts = [[p.detach() for n, p in model.named_parameters() if n.endswith(".A")] for model in (first, second, other)]
    assert all(torch.equal(a, b) for a, b in zip(*parts[:2], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(parts[0], parts[2], strict=True))
    assert not torch.equal(parts[0][0], parts[0][1])
    assert state.shape == torch.get_rng_state().shape


def test_it_starts_where_a_method_ended():
    """GPTQ's codes at step 0; the frozen W are the centres of its cells."""
    student, rule = tiny(), recipe(3)
    prepare(student, rule, MinMax(), LSQ())
    found = gptq(tiny(), rule, [IDS], observer=MinMax())
    start_from(student, found)
    add_lora(student, LORA)
    tensors, _ = convert(student)
    assert all(torch.equal(tensors[name].codes, tensor.codes) for name, tensor in found.tensors.items())


def test_qlora_trains_beside_a_base_that_stays():
    student = qlora()
    assert {name.rpartition(".")[2] for name in trained(student)} == {"A", "B"}
    before = copy.deepcopy(student.state_dict())
    steps(student)
    moved = {name for name, value in student.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == trained(student)
    assert any(name.endswith(".words") for name in before)


@pytest.mark.parametrize("norms", [False, True])
def test_the_merged_model_is_what_qlora_trained_to_rounding(norms):
    """Whole graph, storage fp32: only the order of sums differs. In bf16 the rounding of the weights is added."""
    student = steps(qlora(QLoRA(rank=4, alpha=8, group_size=32, norms=norms), storage=torch.float32)).eval()
    logits = student(input_ids=IDS).logits.detach()
    folded = merge(student, torch.float32)
    assert {name.rpartition(".")[0].rpartition(".")[2].rpartition("_")[2] for name in folded} == (
        {"proj", "layernorm", "norm"} if norms else {"proj"}
    )
    served, size = apply(tiny(), {}, folded), float(logits.abs().max())
    assert torch.allclose(served(input_ids=IDS).logits, logits, atol=1e-5 * size)
    assert not torch.allclose(tiny()(input_ids=IDS).logits, logits, atol=1e-2 * size)
    for name, linear in student.named_modules():
        if isinstance(linear, QLoRALinear):
            assert torch.equal(folded[f"{name}.weight"], linear.merged())
            assert torch.equal(merge(student)[f"{name}.weight"], linear.merged().bfloat16())


@pytest.mark.parametrize("method", [partial(m, observer=MinMax()) for m in (rtn, gptq)])
def test_any_method_quantizes_the_merged_model(method):
    folded = merge(steps(qlora()))
    merged = apply(tiny(), {}, folded)
    changes = method(merged, recipe(3), [IDS])  # of the merged weights, not of the model's own
    own = method(tiny(), recipe(3), [IDS])
    assert all(not torch.equal(t.codes, own.tensors[n].codes) for n, t in changes.tensors.items())
    apply(merged, changes.tensors, changes.folded)(input_ids=IDS)


def test_what_is_served_against_what_was_trained():
    """KL of the whole model: 0 for LoRA-QAT; that of a rounding to bf16 for QLoRA; that of PTQ if it is quantized."""

    def kl(model, trained):
        p, q = (m.eval()(input_ids=IDS).logits.detach().double().log_softmax(-1) for m in (trained, model))
        return float((p.exp() * (p - q)).sum(-1).mean())

    student = steps(lora(), 8)
    assert kl(apply(tiny(), *convert(student)), student) == 0.0
    student = steps(qlora(), 8)
    merged = apply(tiny(), {}, merge(student))
    changes = rtn(merged, recipe(4), [], observer=MinMax())
    assert 0 < kl(merged, student) < 1e-3
    assert kl(apply(merged, changes.tensors, changes.folded), student) > 100 * kl(merged, student)


def test_divergence_is_named():
    student = qlora()
    with torch.no_grad():
        student.model.layers[1].mlp.up_proj.adapter.B[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj\.weight: not finite"):
        merge(student)
    student = lora()
    with torch.no_grad():
        student.model.layers[1].mlp.up_proj.adapter.B[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.mlp\.up_proj: a scale or a weight is not finite"):
        convert(student)


def test_groups_of_the_base_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"q_proj: adapter.group_size=48: group_size=48 does not divide 64"):
        qlora(QLoRA(group_size=48))


def test_only_what_the_recipe_names_is_adapted():
    rule = Recipe({"a": Rule(".*down_proj", Scheme(IntGrid(4), PerGroup(32)))})
    student = tiny()
    prepare_qlora(student, rule, QLORA)
    assert sum(isinstance(m, QLoRALinear) for m in student.modules()) == 2
    student = tiny()
    prepare(student, rule, MinMax(), LSQ())
    add_lora(student, LORA)
    assert {name.split(".")[4] for name in trained(student)} == {"down_proj"}
