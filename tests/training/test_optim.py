import itertools
import math

import pytest
import torch
from tiny import recipe, tiny

from qat.nn.estimators import LSQ, LSQPlus, StraightThrough
from qat.nn.observers.minmax import MinMax
from qat.surgery.prepare import fake_quants, prepare
from qat.training.optim import Optim


def groups(estimator=None, symmetric=True, **kwargs):
    student = tiny()
    prepare(student, recipe(symmetric=symmetric), MinMax(), estimator or LSQ())
    optimizer, schedule = Optim(**kwargs).build(student, 100)
    return student, {g["name"]: g for g in optimizer.param_groups}, schedule


def test_every_trainable_parameter_is_in_one_group():
    student, found, _ = groups()
    ids = [id(p) for g in found.values() for p in g["params"]]
    assert sorted(ids) == sorted(id(p) for p in student.parameters() if p.requires_grad)
    assert (len(found["weights"]["params"]), len(found["vectors"]["params"]), len(found["scales"]["params"])) == (
        14,
        5,
        14,
    )


def test_rates_and_decay_are_those_of_the_group():
    _, found, _ = groups(lr=0.1, scale_lr=0.2, weight_decay=0.3)
    assert {n: (g["initial_lr"], g["weight_decay"]) for n, g in found.items()} == {
        "weights": (0.1, 0.3), "vectors": (0.1, 0.0), "scales": (0.2, 0.0)
    }  # fmt: skip


def test_zero_points_train_as_scales_do():
    """At their rate, and without decay, which would draw them to where they were observed."""
    student, found, _ = groups(LSQPlus(), symmetric=False)
    steps = [p for n, p in student.named_parameters() if n.endswith((".log_step", ".zero_step"))]
    assert len(steps) == 28
    assert {id(p) for p in found["scales"]["params"]} == {id(p) for p in steps}


def test_without_learned_scales_there_is_no_group_for_them():
    _, found, _ = groups(StraightThrough())
    assert set(found) == {"weights", "vectors"}


def test_warm_up_and_cosine():
    optim = Optim(warmup=0.1, final=0.25)
    factors = [optim.factor(step, 100) for step in range(101)]
    assert factors[0] == pytest.approx(0.1, rel=1e-3)
    assert factors[9] == pytest.approx(0.25 + 0.75 * 0.5 * (1 + math.cos(math.pi * 0.09)))
    assert factors[100] == pytest.approx(0.25)
    assert all(a >= b for a, b in itertools.pairwise(factors[9:]))
    assert Optim(warmup=0.0).factor(0, 1) > 0


def test_with_scales_alone_nothing_else_has_a_gradient_or_a_group():
    student = tiny()
    prepare(student, recipe(), MinMax(), StraightThrough())
    optim = Optim(train="scales", scale_lr=1.0)
    optim.select(student)
    optimizer, _ = optim.build(student, 100)
    assert [g["name"] for g in optimizer.param_groups] == ["scales"]
    assert {n.rpartition(".")[2] for n, p in student.named_parameters() if p.requires_grad} == {"log_step"}
    codes = [m.weight_fake_quant.codes(m.weight) for m in fake_quants(student).values()]
    for _ in range(3):
        optimizer.zero_grad()
        student(input_ids=torch.arange(24).view(2, 12)).logits.square().mean().backward()
        optimizer.step()
    now = [m.weight_fake_quant.codes(m.weight) for m in fake_quants(student).values()]
    assert all(torch.equal(a, b) for a, b in zip(codes, now, strict=True))
    assert all(bool(m.weight_fake_quant.log_step.any()) for m in fake_quants(student).values())


@pytest.mark.parametrize("bad", [{"train": "norms"}, {"lr": -1.0}, {"lr": math.nan}, {"warmup": 1.5}, {"final": -0.1}])
def test_values_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=rf"optim\.{next(iter(bad))}="):
        Optim(**bad)


def test_one_step_at_1e_5_changes_the_masters():
    """In bf16, 99.8 % of the weights would lose such a step."""
    student, found, _ = groups(lr=1e-5, warmup=0.0)
    before = [p.detach().clone() for p in found["weights"]["params"]]
    optimizer, _ = Optim(lr=1e-5, warmup=0.0).build(student, 100)
    student(input_ids=torch.arange(24).view(2, 12)).logits.square().mean().backward()
    optimizer.step()
    pairs = zip(before, found["weights"]["params"], strict=True)
    changed = [float((b != p).float().mean()) for b, p in pairs]
    assert min(changed) > 0.9
