"""AutoRound: steps of one size, roundings that stay within half a step, and blocks that end closer to their targets."""

from dataclasses import replace

import pytest
import torch
from tiny import recipe, tiny

from qat.nn.estimators import EfficientQAT
from qat.nn.observers.minmax import MinMax
from qat.ptq.rtn import rtn
from qat.surgery.convert import convert
from qat.surgery.prepare import fake_quants, prepare
from qat.training.blockwise import blockwise
from qat.training.signed import SignedSGD, signed

BATCHES = list(torch.randint(0, 256, (8, 16), generator=torch.Generator().manual_seed(1)).split(4))
KNOBS = {"observer": MinMax(), "estimator": EfficientQAT(), "train": ("round", "scales"), "signed": True}


def student(convention="ct"):
    model = tiny(layers=1)
    prepare(model, by(convention), MinMax(), EfficientQAT())
    return model


def by(convention):
    found = recipe(3)
    rules = {k: replace(r, weight=replace(r.weight, convention=convention)) for k, r in found.rules.items() if r.weight}
    return replace(found, rules=found.rules | rules)


@pytest.mark.parametrize("convention", ["ct", "signed"])
def test_a_step_has_one_size_for_weights_in_steps_of_their_grid_and_for_scales(convention):
    model = student(convention)
    linear = next(iter(fake_quants(model).values()))
    (scale,) = [p for p in linear.weight_fake_quant.parameters() if p.requires_grad]
    optimizer = SignedSGD(model, 0.25, 0.125)
    weight, log, unit = linear.weight.detach().clone(), scale.detach().clone(), linear.weight_fake_quant.qparams()[0]
    linear.weight.grad, scale.grad = torch.randn_like(weight), torch.randn_like(log)
    linear.weight.grad[:, 3] = 0
    optimizer.step()
    unit = unit.detach().float().abs().repeat_interleave(32, 1)
    assert torch.equal(linear.weight, weight - 0.25 * unit * linear.weight.grad.sign())
    assert torch.equal(linear.weight[:, 3], weight[:, 3])
    assert torch.equal(scale, log - 0.125 * scale.grad.sign())


def test_rates_are_one_over_the_steps_and_fall_to_nothing():
    optimizer, schedule = signed(student(), 8, None, 0.5)
    rates = []
    for _ in range(8):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert rates[0] == [1 / 8, 0.5]
    assert rates[4] == [1 / 16, 0.25]
    assert [group["lr"] for group in optimizer.param_groups] == [0, 0]


@pytest.mark.parametrize("convention", ["ct", "signed"])
def test_blocks_end_closer_and_no_code_is_more_than_one_from_its_nearest(convention):
    """Scales held, so that the grid is that of rounding to nearest."""
    model = tiny(layers=2)
    found = blockwise(
        model, by(convention), BATCHES, **{**KNOBS, "train": ("round",)}, epochs=6, lr=None, scale_lr=None
    )
    nearest = rtn(model, by(convention), [], observer=MinMax())
    assert all(row["loss"] < 0.5 * row["initial"] for row in found.layers)
    moved = 0
    for name, tensor in nearest.tensors.items():
        assert torch.equal(tensor.scale, found.tensors[name].scale)
        assert int((tensor.codes.int() - found.tensors[name].codes.int()).abs().max()) <= 1
        moved += int((tensor.codes != found.tensors[name].codes).sum())
    assert moved > 100
    assert all(torch.equal(value.float(), model.get_parameter(name)) for name, value in found.folded.items())


def test_scales_learn_too():
    model = tiny(layers=1)
    found = blockwise(model, recipe(2), BATCHES, **KNOBS, epochs=6, lr=None, scale_lr=None)
    held = blockwise(model, recipe(2), BATCHES, **{**KNOBS, "train": ("round",)}, epochs=6, lr=None, scale_lr=None)
    assert found.layers[0]["loss"] < held.layers[0]["loss"]


def test_only_signed_rates_may_be_left_out():
    with pytest.raises(ValueError, match=r"blockwise: lr=null has a meaning with signed=true only"):
        blockwise(tiny(), recipe(), BATCHES, **{**KNOBS, "signed": False}, lr=None)


def test_what_does_not_train_does_not_move():
    model = student()
    for linear in fake_quants(model).values():
        linear.weight.requires_grad_(False)
    before = convert(model)[0]
    optimizer = SignedSGD(model, 1.0, 0.0)
    optimizer.step()
    assert all(torch.equal(tensor.codes, before[name].codes) for name, tensor in convert(model)[0].items())
