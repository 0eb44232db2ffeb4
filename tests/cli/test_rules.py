from dataclasses import replace
from itertools import product

import pytest
from tiny_grids import PAIRS

from qat.cli.rules import check_rules
from qat.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from qat.numerics.grid import Codebook, FloatGrid, IntGrid
from qat.numerics.kv import KINDS
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme

DYNAMIC = {"_target_": "qat.ptq.gptq.gptq", "act_order": "dynamic"}
GOOD = Scheme(IntGrid(4), PerGroup(16))
TOKEN = Scheme(IntGrid(8), PerToken(), dynamic=True)


def said(config, recipe=None):
    return [str(problem) for problem in check_rules(config, {"recipe": recipe} if recipe else {})]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"schedule": {"start": -1, "freeze": 0}}, "schedule.start: a step of -1"),
        ({"schedule": {"start": 10, "freeze": 10}, "trainer": {"max_steps": 10}}, "schedule.start: 10 is not below"),
        ({"schedule": {"start": 5, "freeze": 4}, "trainer": {"max_steps": 10}}, "schedule.freeze: 4 comes before"),
        (
            {
                "schedule": {"start": 0, "freeze": 10},
                "trainer": {"max_steps": 10},
                "estimator": {"_target_": "qat.nn.estimators.LSQ"},
            },
            "schedule.freeze: scales follow the weights until step 10, which is not below trainer.max_steps=10: the es",
        ),
        (
            {
                "schedule": {"start": 9, "freeze": 9},
                "trainer": {"max_steps": 10},
                "estimator": {"_target_": "qat.nn.estimators.LSQ"},
            },
            "schedule.freeze: scales follow the weights until step 10, which",  # for one step at least
        ),
        (
            {"schedule": {"start": 2, "freeze": 2, "ramp": 8}, "trainer": {"max_steps": 10}},
            "schedule.ramp: 8 steps from schedule.start=2 on are not below trainer.max_steps=10: weights would never "
            "be on their grid; at most 7",
        ),
        ({"schedule": {"start": 0, "freeze": 0, "ramp": -1}}, "schedule.ramp: a step of -1"),
        (
            {"schedule": {"start": 0, "freeze": 6, "winq": {"every": 5, "alpha": 0.5}}, "trainer": {"max_steps": 10}},
            "schedule.winq.every: no multiple of 5 lies between step 6, when scales are settled, and trainer.max_steps",
        ),
        ({"optim": {"betas": [0.9, 1.0]}}, "optim.betas[1]: expected a number from 0 to below 1, found 1.0"),
        (
            {"init": {"method": {"_target_": "qat.nn.estimators.LSQ"}}},
            "init.method._target_: qat.nn.estimators.LSQ is no PTQ",
        ),
        (
            {"method": {"_target_": "qat.ptq.smoothquant.smoothquant", "then": {"_target_": "qat.nn.estimators.LSQ"}}},
            "method.then._target_: qat.nn.estimators.LSQ is no PTQ",
        ),
        (
            {
                "schedule": {"start": 0, "freeze": 2},
                "init": {"method": {"_target_": "qat.ptq.gptq.gptq"}},
                "choices": {"init": "gptq"},
            },
            "schedule.freeze: until step 2 scales follow the weights, and those that init=gptq found are forgotten",
        ),
        (
            {"schedule": {"start": 0, "freeze": 2}, "optim": {"train": "scales"}},
            "schedule.freeze: until step 2 scales follow the weights, but optim.train=scales has its codes settled",
        ),
        (
            {"schedule": {"winq": {"every": 5, "alpha": 0.5}}, "optim": {"train": "scales"}},
            "schedule.winq: optim.train=scales trains no masters",
        ),
        (
            {"method": DYNAMIC, "format": {"name": "awq"}},
            "method.act_order: dynamic needs a g_idx, which format=awq cannot carry; use group or static, or format=",
        ),
        (
            {"adapter": {"then": {"_target_": "qat.ptq.gptq.gptq", "act_order": "static", "groups": "current"}}},
            "adapter.then.groups: current ranges go with act_order=group, dynamic or none, which take whole groups",
        ),
        (
            {"method": {"_target_": "qat.ptq.gptq.gptq", "act_order": "static", "groups": "stale"}},
            "method.groups: stale ranges go with act_order=group, dynamic or none, which take whole groups",
        ),
        ({"arms": {"x": DYNAMIC}, "format": {"name": "gguf"}}, "arms.x.act_order: dynamic needs a g_idx, which"),
        (
            {"method": {"_target_": "qat.ptq.rotate.rotate", "then": DYNAMIC}, "format": {"name": "gguf"}},
            "method.then.act_order: dynamic needs a g_idx, which format=gguf cannot carry",
        ),
        (
            {"init": {"method": DYNAMIC}, "format": {"name": "none"}},
            "init.method.act_order: training's groups are of consecutive in-features, and dynamic ones are not; use g",
        ),
        ({"arms": {"fp": {}}}, "arms.fp: every comparison has an arm of this name"),
        ({"arms": {"a/b": {}}}, "arms.a/b: an arm's name"),
        ({"arms": {"x": {"_target_": "qat.nn.estimators.LSQ"}}}, "arms.x._target_: qat.nn.estimators.LSQ is no PTQ"),
        ({"arms": {"x": {"_target_": "qat.ptq.gptq.gptq", "damping": -1}}}, "arms.x.damping: expected a finite number"),
        (
            {"method": {"_target_": "qat.ptq.rotate.rotate", "then": {"_target_": "qat.ptq.awq.awq", "grid": -3}}},
            "method.then.grid: expected an integer",
        ),
    ],
)
def test_what_contradicts_is_said(config, words):
    (text,) = said(config)
    assert text.startswith(words)


@pytest.mark.parametrize(
    "config",
    [
        {"schedule": {"start": 0, "freeze": 10}, "trainer": {"max_steps": 10}, "estimator": {"_target_": "x.Clipped"}},
        {"arms": {"gptq_g32": {"_target_": "qat.ptq.gptq.gptq"}}},
        {"arms": {"own": {"_target_": "mine.method", "damping": -1}}},
        *({"method": DYNAMIC, "format": {"name": name}} for name in ("gptq", "compressed_tensors", "none")),
        {"arms": {"blockap": {"_target_": "qat.training.blockwise.blockwise"}}},
        {"init": {"method": None}, "optim": {"train": "all"}, "schedule": {"start": 0, "freeze": 2}},
        {"schedule": {"start": "a", "freeze": None}, "optim": {"betas": 1}, "arms": 3},  # others' business
    ],
)
def test_what_fits_or_is_broken_otherwise_passes(config):
    assert said(config) == []


@pytest.mark.parametrize(("rule", "count"), [(Rule("x", GOOD), 0), (Rule("x", Scheme(IntGrid(8), PerChannel())), 0),
                                             (Rule("x", Scheme(IntGrid(8), PerChannel()), TOKEN), 0),
                                             (Rule("x", replace(GOOD, grid=IntGrid(8)), TOKEN), 1)])  # fmt: skip
def test_a_g_idx_stands_beside_packed_integers_alone(rule, count):
    found = said({"method": DYNAMIC, "format": {"name": "compressed_tensors"}}, Recipe({"all": rule}))
    assert len(found) == count
    assert all("in pack-quantized alone, and recipe.rules.all is not; use group or static" in text for text in found)


def test_the_schedule_says_the_same():
    """What this page refuses is what the schedule itself refuses, before training starts."""
    from qat.training.phases import PhaseSchedule
    from qat.training.winq import WinQ

    for start, freeze, ramp, every in product((-1, 0, 1, 5, 6), (0, 1, 4, 5, 6), (-1, 0, 2, 5, 6), (None, 1, 2, 4, 6)):
        node = {"start": start, "freeze": freeze, "ramp": ramp, "winq": every and {"every": every, "alpha": 0.5}}
        refused = bool(said({"schedule": node, "trainer": {"max_steps": 6}}))
        try:
            PhaseSchedule(start, freeze, ramp, every and WinQ(every, 0.5)).check(6)
        except ValueError:
            assert refused, node
        else:
            assert not refused, node


LORA, QLORA = ({"_target_": f"qat.nn.adapter.{kind}"} for kind in ("LoRA", "QLoRA"))
GPTQ = {"_target_": "qat.ptq.gptq.gptq"}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"adapter": LORA, "optim": {"train": "scales"}}, "optim.train: scales alone would train, and no adapter"),
        ({"adapter": QLORA, "optim": {"train": "scales"}}, "optim.train: scales alone would train, and no adapter"),
        ({"adapter": QLORA, "init": {"method": GPTQ}, "choices": {"init": "gptq"}}, "init.method: QLoRA's frozen base"),
        ({"adapter": QLORA, "schedule": {"freeze": 3}}, "schedule.freeze: QLoRA fake-quantizes nothing"),
        ({"adapter": QLORA, "schedule": {"ramp": 3}}, "schedule.ramp: QLoRA fake-quantizes nothing"),
        ({"adapter": LORA, "schedule": {"winq": {"every": 1}}}, "schedule.winq: it would move masters"),
        ({"adapter": QLORA, "format": {"name": "compressed_tensors"}}, "format.name: merged QLoRA weights are unquant"),
        ({"adapter": QLORA, "recipe": {"kv": {"_target_": "x"}}}, "recipe.kv: merged QLoRA weights are unquantized"),
        ({"adapter": QLORA | {"then": {"_target_": "qat.nn.estimators.LSQ"}}}, "adapter.then._target_: qat.nn.estimat"),
    ],
)
def test_what_an_adapter_cannot_have_is_said(config, words):
    (text,) = said(config)
    assert text.startswith(words)


@pytest.mark.parametrize(
    "config",
    [
        {"adapter": {}, "optim": {"train": "scales"}, "init": {"method": GPTQ}},
        {"adapter": LORA, "init": {"method": GPTQ}, "format": {"name": "compressed_tensors"}},
        {"adapter": LORA, "schedule": {"start": 1, "freeze": 3}, "trainer": {"max_steps": 4}},
        {"adapter": QLORA, "format": {"name": "none"}},
        {"adapter": QLORA | {"then": GPTQ}, "format": {"name": "compressed_tensors"}, "recipe": {"kv": {}}},
        {"adapter": 3},
    ],
)
def test_what_an_adapter_can_have_passes(config):
    assert said(config) == []


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (Rule(".*", None), "recipe.rules: no rule has a weight scheme"),
        (
            Rule(".*", Scheme(IntGrid(8), PerToken(), dynamic=True)),
            "recipe.rules.a.weight.granularity: a weight has no",
        ),
        (Rule(".*", Scheme(IntGrid(8), PerChannel(), dynamic=True)), "recipe.rules.a.weight.dynamic: a weight's scale"),
    ],
)
def test_recipes_that_quantize_no_weight(rule, words):
    (text,) = said({}, Recipe({"a": rule}))
    assert text.startswith(words)


def test_widths_are_chosen_on_integer_grids():
    assert said({"bits": [2, 4]}, Recipe({"a": Rule(".*", GOOD), "b": Rule("x", None)})) == []
    recipe = Recipe({"a": Rule(".*", GOOD), "b": Rule("x", Scheme(Codebook("nf4"), PerGroup(16)))})
    (text,) = said({"bits": [2, 4]}, recipe)
    assert text == "recipe.rules.b.weight.grid: nf4_g16: only integer grids have widths to choose from"
    assert said({}, recipe) == []


def test_an_estimator_matters_where_something_is_trained():
    recipe = Recipe({"a": Rule(".*", Scheme(FloatGrid("e4m3"), PerGroup(32), scale_dtype="float8_e8m0fnu"))})
    lsq, gptq = {"_target_": "qat.nn.estimators.LSQ"}, {"_target_": "qat.ptq.gptq.gptq"}
    trained = {"_target_": "qat.training.blockwise.blockwise", "estimator": lsq}
    for config in (
        {"verb": "train"},
        {"verb": "ptq", "method": trained},
        {"verb": "ptq", "method": gptq | {"then": trained}},
    ):
        (text,) = said(config | {"estimator": lsq}, recipe)
        assert text.startswith("estimator: LSQ learns a scale, but those of recipe.rules.a.weight are powers of two")
    assert said({"verb": "ptq", "method": gptq | {"then": None}, "estimator": lsq}, recipe) == []


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        (
            Recipe({"a": Rule(".*", GOOD, Scheme(IntGrid(8), PerTensor(), dynamic=True))}),
            "recipe.rules.a.input: format=compressed_tensors carries no input scheme that makes a token depend",
        ),
        (
            Recipe({"a": Rule(".*", Scheme(IntGrid(8), PerTensor(), symmetric=False))}),
            "recipe.rules.a.weight.symmetric: format=compressed_tensors packs zero points per channel or group",
        ),
        (
            Recipe({"a": Rule(".*", Scheme(Codebook("nf4"), PerGroup(16)))}),
            "recipe.rules.a.weight.grid: format=compressed_tensors carries integers, e4m3, NVFP4",
        ),
    ],
)
def test_what_the_format_cannot_carry(recipe, words):
    (text,) = said({"format": {"name": "compressed_tensors"}}, recipe)
    assert text.startswith(words)
    assert said({"format": {"name": "another"}}, recipe) == []


def test_caches():
    for kv in KINDS.values():
        assert said({"format": {"name": "compressed_tensors"}}, Recipe({"a": Rule(".*", GOOD)}, kv=kv)) == []
    (text,) = said({}, Recipe({"a": Rule(".*", GOOD)}, kv=Scheme(IntGrid(8), PerTensor())))
    assert text.startswith("recipe.kv: granularity=PerTensor()")
    assert "use granularity=PerToken()" in text


@pytest.mark.parametrize(
    ("weight", "input"),
    [
        (Scheme(IntGrid(8), PerTensor(), symmetric=False), None),
        (Scheme(IntGrid(8), PerTensor()), None),
        (Scheme(IntGrid(8), PerChannel(), dynamic=True), None),
        (GOOD, Scheme(IntGrid(8), PerToken(), dynamic=True)),
        (GOOD, Scheme(IntGrid(8), PerTensor(), dynamic=True)),
        (GOOD, None),
        *PAIRS.values(),
    ],
)
def test_the_format_says_the_same(weight, input):
    """What this page refuses is what the format itself refuses when it saves."""
    from qat.formats.compressed_tensors import check_scheme

    refused = bool(said({"format": {"name": "compressed_tensors"}}, Recipe({"a": Rule(".*", weight, input)})))
    try:
        check_scheme("a", weight, input)
    except ValueError:
        assert refused
    else:
        assert not refused
