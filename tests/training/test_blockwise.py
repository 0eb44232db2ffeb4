"""Block-AP: nothing learned is RTN; what is learned is better, resumable, and served as it was trained."""

import copy
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from tiny import recipe, scheme, tiny
from tiny_grids import OTHERS

from qat.nn.estimators import LSQ, Clipped, EfficientQAT, LSQPlus, StraightThrough
from qat.nn.observers.minmax import MinMax
from qat.numerics.granularity import PerTensor, PerToken
from qat.numerics.grid import IntGrid
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import E8M0, Scheme
from qat.ptq.rtn import rtn
from qat.surgery.convert import apply
from qat.surgery.prepare import prepare
from qat.surgery.start import start_from
from qat.training import blockwise as steps
from qat.training.blockwise import blockwise, order

BATCHES = list(torch.randint(0, 256, (8, 16), generator=torch.Generator().manual_seed(1)).split(4))
SCHEMES = {"int3": scheme(3), "asymmetric": scheme(3, symmetric=False)} | {
    name: OTHERS[name] for name in ("nvfp4", "mxfp4", "PerGroup(group_size=16)_nf4")
}
INPUTS = {
    "dynamic": Scheme(IntGrid(4), PerToken(), dynamic=True),
    "static": Scheme(IntGrid(4), PerTensor(), symmetric=False),
}
ALL = ("weights", "scales", "zeros", "norms")


def train(model, rules=None, **more):
    settings = {"observer": MinMax(), "estimator": LSQ(), "lr": 4e-3, "scale_lr": 2e-2} | more
    return blockwise(model, rules or recipe(3), BATCHES, **settings)


def same(a, b):
    assert a.tensors.keys() == b.tensors.keys()
    assert a.folded.keys() == b.folded.keys()
    for name, tensor in a.tensors.items():
        assert torch.equal(tensor.codes, b.tensors[name].codes), name
        assert torch.equal(tensor.scale, b.tensors[name].scale), name
    assert all(torch.equal(value, b.folded[name]) for name, value in a.folded.items())
    assert all(torch.equal(value, b.state[name]) for name, value in a.state.items())


@pytest.mark.parametrize("rule", SCHEMES.values(), ids=SCHEMES)
def test_law_c_with_lr_0_from_a_minmax_start_it_is_rtn(rule):
    model, rules = tiny(), Recipe({"linears": Rule(".*_proj", rule)})
    estimator = Clipped() if rule.scale_dtype == E8M0 else EfficientQAT()
    found = train(model, rules, lr=0.0, scale_lr=0.0, estimator=estimator)
    base = rtn(model, rules, [], observer=MinMax())
    assert found.tensors.keys() == base.tensors.keys()
    for name, tensor in base.tensors.items():
        assert torch.equal(tensor.codes, found.tensors[name].codes)
        assert torch.equal(tensor.scale, found.tensors[name].scale)
        assert not rule.two_level or torch.equal(tensor.global_scale, found.tensors[name].global_scale)
    assert all(torch.equal(value.float(), model.get_parameter(name)) for name, value in found.folded.items())
    assert all(row["loss"] == row["initial"] > 0 for row in found.layers)


@pytest.mark.parametrize("relative", [True, False])
def test_every_block_ends_closer_to_its_target_and_the_model_is_left_alone(relative):
    model = tiny(layers=3)
    before = copy.deepcopy(model.state_dict())
    found = train(model, relative=relative)
    assert [row["name"] for row in found.layers] == [f"model.layers.{i}" for i in range(3)]
    assert [row["steps"] for row in found.layers] == [2 * 4] * 3
    assert all(row["loss"] < 0.9 * row["initial"] for row in found.layers)
    nearest = train(model, relative=relative, lr=0.0, scale_lr=0.0)
    assert found.layers[-1]["loss"] < 0.7 * nearest.layers[-1]["loss"]  # and so does the model as a whole
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_targets_are_full_precision_and_inputs_are_what_the_quantized_blocks_serve():
    """The losses of the untrained and of the trained block, computed by whole models beside the walk."""
    model, ids = tiny(layers=2), torch.cat(BATCHES)
    found = train(model, relative=False)
    only_first = {name: t for name, t in found.tensors.items() if ".layers.0." in name}
    folded_first = {name: v for name, v in found.folded.items() if ".layers.0." in name}
    first = apply(model, only_first, folded_first)
    second = dict(rtn(model, recipe(3), [], observer=MinMax()).tensors)
    begun = apply(first, {name: t for name, t in second.items() if ".layers.1." in name}, {})
    target = _before_the_norm(model, ids)
    for graph, value in ((begun, "initial"), (apply(model, found.tensors, found.folded), "loss")):
        expected = float((_before_the_norm(graph, ids) - target).square().mean())
        assert found.layers[1][value] == pytest.approx(expected, rel=1e-5)


def _before_the_norm(model, ids):
    seen = []
    handle = model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("lr", [0.0, 4e-3])
def test_a_bf16_model_trains_in_bf16_on_fp32_masters(lr):
    """As on a GPU: parameters and streams in bf16, autocast, and what propagates is what is judged."""
    model, rules = tiny().bfloat16(), Recipe({"linears": Rule(".*_proj", scheme(3), INPUTS["static"])})
    found = train(model, rules, lr=lr, scale_lr=lr, relative=False)
    assert {value.dtype for name, value in found.state.items() if name.endswith("_proj.weight")} == {torch.float32}
    graph = apply(model, found.tensors, found.folded, recipe=rules)
    error = _before_the_norm(graph, torch.cat(BATCHES)) - _before_the_norm(model, torch.cat(BATCHES))
    assert found.layers[1]["loss"] == pytest.approx(float(error.float().square().mean()), rel=0.1)
    if lr:
        assert all(row["loss"] < row["initial"] for row in found.layers)
    else:
        base = rtn(model, rules, [], observer=MinMax()).tensors
        assert all(torch.equal(tensor.codes, base[name].codes) for name, tensor in found.tensors.items())


def test_a_relative_error_weighs_every_token_alike():
    model, ids = tiny(layers=1), torch.cat(BATCHES)
    found = train(model, relative=True)
    target = _before_the_norm(model, ids)
    error = _before_the_norm(apply(model, found.tensors, found.folded), ids) - target
    expected = (error.square().mean(-1) / target.square().mean(-1)).mean()
    assert found.layers[0]["loss"] == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
    "train_only", [["weights"], ["scales"], ["zeros"], ["norms"], ["round", "scales"], list(ALL)], ids=" ".join
)
def test_what_is_named_trains_and_nothing_else(train_only):
    model = tiny(layers=1)
    found = train(model, recipe(2, symmetric=False), train=train_only, estimator=EfficientQAT())
    name = "model.layers.0.mlp.up_proj"
    moved = {
        "weights": not torch.equal(found.state[f"{name}.weight"], model.get_parameter(f"{name}.weight")),
        "scales": bool(found.state[f"{name}.weight_fake_quant.log_step"].any()),
        "zeros": bool(found.state[f"{name}.weight_fake_quant.zero_step"].any()),
        "norms": not torch.equal(
            found.folded["model.layers.0.input_layernorm.weight"].float(), model.model.layers[0].input_layernorm.weight
        ),
    }
    expected = {"weights" if part == "round" else part for part in train_only}
    assert {part for part, yes in moved.items() if yes} == expected
    if train_only != ["zeros"]:  # few steps, none of which takes a zero point to the next integer
        assert found.layers[0]["loss"] < found.layers[0]["initial"]


def test_rounding_moves_a_code_by_one_at_most_and_weights_further():
    model = tiny(layers=1)
    base = rtn(model, recipe(4), [], observer=MinMax()).tensors

    def furthest(part):
        found = train(model, recipe(4), train=[part], lr=0.1).tensors
        return max(int((t.codes.int() - base[name].codes.int()).abs().max()) for name, t in found.items())

    assert furthest("round") == 1
    assert furthest("weights") > 1


@pytest.mark.parametrize("stop", [1, 2])
def test_killed_and_resumed_is_unbroken(tmp_path, stop):
    model = tiny(layers=3)
    whole = train(model, offload=True)

    class Killed(Exception):
        pass

    def kill(done, blocks):
        if done == stop:
            raise Killed

    with pytest.raises(Killed):
        train(model, store=tmp_path, progress=kill)
    visited = []
    resumed = train(model, store=tmp_path, progress=lambda done, blocks: visited.append(done))
    assert visited == list(range(stop + 1, 4))
    same(whole, resumed)
    assert [row["loss"] for row in whole.layers] == [row["loss"] for row in resumed.layers]
    same(whole, train(model, store=tmp_path, progress=lambda done, blocks: pytest.fail("trained again")))


def test_the_order_of_batches_is_of_seed_block_and_epoch():
    orders = [order(*of, 32) for of in ((0, "a", 0), (1, "a", 0), (0, "b", 0), (0, "a", 1))]
    assert all(sorted(found) == list(range(32)) for found in orders)
    assert len({tuple(found) for found in orders}) == 4
    assert order(0, "a", 0, 32) == orders[0]
    model = tiny(layers=1)
    codes = [train(model, seed=seed).tensors["model.layers.0.mlp.up_proj"].codes for seed in (0, 0, 1)]
    assert torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], codes[2])


def test_training_goes_on_from_it_with_nothing_lost():
    """Step 0 has exactly its codes, and the masters are those that it trained, not the centres of cells."""
    model, rules = tiny(), recipe(3, symmetric=False)
    found = train(model, rules, estimator=EfficientQAT())
    student = tiny()
    prepare(student, rules, MinMax(), EfficientQAT())
    start_from(student, found)
    served = apply(model, found.tensors, found.folded)
    assert torch.equal(student(input_ids=BATCHES[0]).logits, served(input_ids=BATCHES[0]).logits)
    state = student.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in found.state.items())
    name = "model.layers.1.mlp.up_proj"
    assert not torch.equal(state[f"{name}.weight"], found.tensors[name].dequantize(torch.float32))


@pytest.mark.parametrize("kind", INPUTS)
def test_quantized_inputs_are_what_later_blocks_see(kind):
    rules = Recipe({"linears": Rule(".*_proj", scheme(), INPUTS[kind])})
    model = tiny(layers=2)
    found = train(model, rules, lr=0.0, scale_lr=0.0, relative=False)
    graph = apply(model, found.tensors, found.folded, recipe=rules)
    error = _before_the_norm(graph, torch.cat(BATCHES)) - _before_the_norm(model, torch.cat(BATCHES))
    assert found.layers[1]["loss"] == pytest.approx(float(error.square().mean()), rel=1e-5)
    assert ("model.layers.1.mlp.up_proj.input_zero_point" in found.folded) is (kind == "static")


@pytest.mark.parametrize("estimator", [Clipped(), LSQPlus()])
def test_static_ranges_of_inputs_are_calibrated_on_the_quantized_stream_trained_and_taken_over(estimator):
    rules = Recipe({"linears": Rule(".*_proj", scheme(3), Scheme(IntGrid(8), PerTensor(), symmetric=False))})
    found = train(tiny(), rules, input_estimator=estimator)
    assert all(row["loss"] < row["initial"] for row in found.layers)
    student = tiny()
    prepare(student, rules, MinMax(), LSQ(), input_estimator=estimator)
    start_from(student, found)
    served = apply(tiny(), found.tensors, found.folded, recipe=rules)
    assert torch.equal(student(input_ids=BATCHES[0]).logits, served(input_ids=BATCHES[0]).logits)
    step = found.state["model.layers.1.mlp.up_proj.input_fake_quant.log_step"]
    assert bool(step.any()) is estimator.learns_scale


class Eager:
    """Stands in for `GraphedLoss`: computes what that would replay, and notes for which batches."""

    sizes: ClassVar[list[int]] = []

    def __init__(self, function, parameters, *inputs):
        self.function = function

    def __call__(self, *inputs):
        self.sizes.append(len(inputs[0]))
        return self.function(*inputs)


def test_what_is_captured_is_the_step_and_a_smaller_last_batch_is_not_replayed(monkeypatch):
    expected = train(tiny(), batch_size=3)
    monkeypatch.setattr(steps, "_replays", lambda device: True)
    monkeypatch.setattr(steps, "GraphedLoss", Eager)
    same(expected, train(tiny(), batch_size=3))
    assert Eager.sizes == [3] * 2 * 2 * 2  # whole batches, epochs, blocks


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("rules", "settings"),
    [
        (recipe(3), {}),
        (recipe(2, symmetric=False), {"estimator": EfficientQAT(), "relative": False}),
        (recipe(3), {"train": ["round", "scales"], "batch_size": 3}),
        (recipe(3), {"offload": True}),
        (Recipe({"linears": Rule(".*_proj", scheme(3), INPUTS["dynamic"])}), {}),
        (Recipe({"linears": Rule(".*_proj", scheme(3), INPUTS["static"])}), {"estimator": Clipped()}),
        (Recipe({"linears": Rule(".*_proj", OTHERS["nvfp4"], replace(OTHERS["nvfp4"], dynamic=True))}), {}),
    ],
    ids=["lsq", "efficientqat", "round", "offload", "dynamic", "static", "nvfp4"],
)
def test_replayed_steps_are_the_steps_bit_for_bit(monkeypatch, rules, settings, dtype):
    model = tiny().to("cuda", dtype)
    replayed = train(model, rules, **settings)
    assert all(row["loss"] != row["initial"] for row in replayed.layers)
    monkeypatch.setattr(steps, "_replays", lambda device: False)
    eager = train(model, rules, **settings)
    same(eager, replayed)
    assert [row["loss"] for row in eager.layers] == [row["loss"] for row in replayed.layers]


def test_a_loss_that_is_not_finite_names_the_block_and_keeps_those_before_it(tmp_path):
    model = tiny(layers=3)
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.fill_(1e30)  # finite, but its square is not
    with pytest.raises(ValueError, match=r"model\.layers\.1: .* not finite"):
        train(model, store=tmp_path)
    assert [path.name for path in tmp_path.glob("block-*")] == ["block-0000.safetensors"]


def test_divergence_names_the_block_and_the_step(tmp_path):
    with pytest.raises(
        ValueError, match=r"model\.layers\.0: its loss is not finite at step \d+ of block-wise.*Lower lr"
    ):
        train(tiny(), lr=1e30)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train": []}, "train is empty"),
        ({"train": ["weights", "round"]}, "both weights and round"),
        ({"train": ["bias"]}, "train=bias; it takes weights, round"),
        ({"train": ["zeros"]}, "have nothing; add weights"),
        ({"train": ["scales"], "estimator": StraightThrough()}, "have nothing; add weights"),
        ({"epochs": 0}, "epochs=0; use 1 or more"),
        ({"batch_size": 0}, "batch_size=0; use 1 or more"),
        ({"lr": float("nan")}, "lr=nan; a finite number"),
        ({"rules": Recipe({"head": Rule("lm_head", scheme())})}, "lm_head: block-wise training reaches model.layers"),
    ],
)
def test_what_contradicts_is_refused(settings, words):
    with pytest.raises(ValueError, match=words):
        train(tiny(tied=False), **settings)


def test_a_block_without_quantized_linears_passes_on_what_it_computes():
    model = tiny(layers=3)
    rules = Recipe({"some": Rule(r"model\.layers\.[02]\..*_proj", scheme(3))})
    found = train(model, rules)
    assert [row["name"] for row in found.layers] == ["model.layers.0", "model.layers.2"]
    assert not [name for name in found.folded if ".layers.1." in name]


@pytest.mark.parametrize("batches", [[], [torch.zeros(4, 16, dtype=torch.int64)]], ids=["none", "padding"])
def test_batches_that_calibrate_nothing_are_refused(batches):
    with pytest.raises(ValueError, match="calibration batches"):
        blockwise(tiny(), recipe(3), batches, observer=MinMax(), estimator=LSQ())


def test_a_block_that_gets_nothing_but_zeros_stays_where_it_began():
    model = tiny(layers=1)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight.zero_()
        model.model.layers[0].post_attention_layernorm.weight.zero_()
    found, base = train(model, train=["round", "scales"]), rtn(model, recipe(3), [], observer=MinMax())
    assert all(torch.equal(tensor.codes, found.tensors[name].codes) for name, tensor in base.tensors.items())
    assert [(row["initial"], row["loss"]) for row in found.layers] == [(0.0, 0.0)]


def test_rates_fall_over_all_epochs_of_a_block(monkeypatch):
    built, build = [], steps.Optim.build

    def spy(optim, model, total):
        built.append(total)
        return build(optim, model, total)

    monkeypatch.setattr(steps.Optim, "build", spy)
    once, thrice = (train(tiny(), epochs=epochs).layers for epochs in (1, 3))
    assert [row["steps"] for row in (*once, *thrice)] == built
    assert built[2:] == [3 * total for total in built[:2]]
