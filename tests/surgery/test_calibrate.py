"""Static ranges of inputs: from every batch, of unquantized activations, and the same in the graph that is judged."""

import pytest
import torch
from tiny import scheme, tiny

from qat.nn.estimators import LSQ, Clipped
from qat.nn.fake_quantize import Phase
from qat.nn.observers.minmax import MinMax
from qat.numerics.granularity import PerTensor, PerToken
from qat.numerics.grid import IntGrid
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme
from qat.surgery.calibrate import calibrate, calibrating, check_batches, needing
from qat.surgery.convert import apply, convert, input_scales, quantize_inputs
from qat.surgery.prepare import prepare

STATIC = Scheme(IntGrid(8), PerTensor(), symmetric=False)
TOKEN = Scheme(IntGrid(8), PerToken(), dynamic=True)
BATCHES = [torch.randint(0, 256, (2, 12), generator=torch.Generator().manual_seed(i)) for i in range(3)]


def recipe(input):
    return Recipe({"a": Rule(".*_proj", scheme(), input)})


def prepared(input, estimator=None):
    student = tiny()
    prepare(student, recipe(input), MinMax(), LSQ(), input_estimator=estimator)
    return student


def test_a_second_calibration_knows_nothing_of_the_first():
    twice, once = prepared(STATIC), prepared(STATIC)
    calibrate(twice, BATCHES[:2])
    calibrate(twice, BATCHES[2:])
    calibrate(once, BATCHES[2:])
    pairs = list(zip(needing(twice).values(), needing(once).values(), strict=True))
    assert all((float(a.low), float(a.high)) == (float(b.low), float(b.high)) for a, b in pairs)
    calibrate(twice, BATCHES)
    assert any(float(a.high) != float(b.high) for a, b in pairs)  # more batches, other ranges


def test_ranges_are_those_of_all_batches_before_any_input_is_rounded():
    student = prepared(STATIC)
    plain, heard = prepared(None), {}  # the same weights: without input schemes they compute what calibration sees
    for name, linear in plain.named_modules():
        if name.endswith("_proj"):
            heard[name] = []
            linear.register_forward_pre_hook(lambda _, args, name=name: heard[name].append(args[0].detach()))
    with torch.no_grad():
        for batch in BATCHES:
            plain(input_ids=batch)
    assert calibrate(student, BATCHES) == 14
    for name, module in needing(student).items():
        seen = torch.cat([x.flatten() for x in heard[name.removesuffix(".input_fake_quant")]])
        assert float(module.low) == float(seen.min())
        assert float(module.high) == float(seen.max())
        assert module.phase is Phase.LEARN
        assert module.strength == 1.0


def test_the_judged_graph_computes_what_the_prepared_one_does():
    for input in (STATIC, TOKEN):
        student = prepared(input)
        calibrate(student, BATCHES)
        tensors, folded = convert(student)
        assert len([name for name in folded if "_proj.input_" in name]) == (28 if input is STATIC else 0)
        graph = apply(tiny(), tensors, folded, recipe=recipe(input))
        expected = student.eval()(input_ids=BATCHES[0]).logits
        assert torch.equal(graph(input_ids=BATCHES[0]).logits, expected)
        plain = apply(tiny(), tensors, folded)
        assert not torch.equal(plain(input_ids=BATCHES[0]).logits, expected)


def test_learned_input_scales_are_what_is_stored():
    student = prepared(STATIC, LSQ())
    calibrate(student, BATCHES)
    student.train()(input_ids=BATCHES[0]).logits.square().mean().backward()
    quant = student.model.layers[0].mlp.down_proj.input_fake_quant
    assert float(quant.log_step.grad.abs().sum()) > 0
    with torch.no_grad():
        quant.log_step.fill_(0.5)
    _, folded = convert(student)
    name = "model.layers.0.mlp.down_proj.input_scale"
    assert torch.equal(folded[name], (quant.scale.float() * torch.tensor(0.5).exp()).bfloat16())


def test_a_post_training_arm_keeps_its_ranges_in_the_storage_dtype_as_training_does():
    student = prepared(STATIC)
    calibrate(student, BATCHES)
    for storage in (torch.bfloat16, torch.float16):
        graph = apply(tiny(), {}, {})
        quantize_inputs(graph, recipe(STATIC), {}, storage=storage)
        calibrate(graph, BATCHES)
        found = {n: v for n, v in input_scales(graph).items() if n.endswith("input_scale")}
        assert {v.dtype for v in found.values()} == {storage}
    trained = {n: v.dtype for n, v in convert(student)[1].items() if n.endswith("input_scale")}
    assert set(trained) == set(found)
    assert set(trained.values()) == {torch.bfloat16}


def test_dynamic_ranges_need_none():
    assert calibrate(prepared(TOKEN), BATCHES) == 0
    assert calibrate(prepared(None), BATCHES) == 0


def test_without_batches_static_ranges_are_refused_and_a_module_that_none_reaches_is_named():
    with pytest.raises(ValueError, match="there are no calibration batches"):
        calibrate(prepared(STATIC, Clipped()), [])
    unheard = pytest.raises(ValueError, match=r"^model\.layers\.0\.self_attn\.q_proj\.input_fake_quant: no batch")
    with unheard, calibrating(prepared(STATIC, Clipped())):
        pass


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([], "there are no calibration batches"),
        ([torch.empty(2, 0, dtype=torch.int64)], "there are no calibration batches"),
        ([torch.tensor([[7]])], "nothing but token 7"),
        ([torch.zeros(2, 8, dtype=torch.int64), torch.zeros(1, 8, dtype=torch.int64)], "nothing but token 0: padding"),
        ([torch.full((2, 8), float("nan"))], r"holds torch\.float32; token ids are integers"),
    ],
)
def test_batches_that_cannot_calibrate_are_refused(batches, words):
    with pytest.raises(ValueError, match=words):
        check_batches(batches)
    with pytest.raises(ValueError, match=words):
        calibrate(prepared(STATIC), batches)
    assert calibrate(prepared(TOKEN), batches) == 0


def test_two_tokens_in_different_batches_calibrate():
    check_batches([torch.tensor([[7]]), torch.tensor([[8]])])
