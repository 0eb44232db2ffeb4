"""Rotations as a method: the rotated model, rounded by nearest or by whatever goes on."""

import copy

import pytest
import torch
from tiny import recipe, tiny

from qat.nn.observers.minmax import MinMax
from qat.numerics.recipe import Recipe, Rule
from qat.ptq.gptq import gptq
from qat.ptq.rotate import rotate
from qat.ptq.rtn import rtn
from qat.ptq.smoothquant import divergence, smoothquant
from qat.surgery.convert import apply
from qat.surgery.rotate import rotated

DATA = list(torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(1)).split(2))


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def spiky():
    """A few channels decide the range of every group that they are in, and little else."""
    model = tiny(tied=False)
    for name, parameter in model.named_parameters():
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight", "gate_proj.weight", "up_proj.weight")):
            parameter[:, :2] *= 16
        if name.endswith("layernorm.weight"):
            parameter[:2] /= 8
    return model


def test_it_is_rtn_of_the_rotated_model_and_the_model_is_left_alone():
    model = tiny(tied=False)
    before = copy.deepcopy(model.state_dict())
    changes = rotate(model, recipe(3), [], observer=MinMax(), seed=3)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    moved = rotated(model, "hadamard", True, True, 3)
    expected = rtn(apply(model, {}, moved), recipe(3), [], observer=MinMax()).tensors
    assert changes.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(changes.tensors[name].codes, tensor.codes)
        assert torch.equal(changes.tensors[name].scale, tensor.scale)
    assert changes.folded.keys() == {name for name in moved if "_proj" not in name}
    assert all(torch.equal(value, moved[name].bfloat16()) for name, value in changes.folded.items())


def test_outlying_channels_cost_less_once_they_are_spread():
    model, losses = spiky(), {}
    for name, changes in {
        "rtn": rtn(model, recipe(3), DATA, observer=MinMax()),
        "rotated": rotate(model, recipe(3), DATA, observer=MinMax()),
        "rotated, gptq": rotate(model, recipe(3), DATA, observer=MinMax(), then=gptq_),
    }.items():
        losses[name] = divergence(model, apply(model, changes.tensors, changes.folded), DATA)
    assert losses["rotated"] < 0.6 * losses["rtn"]
    assert losses["rotated, gptq"] < losses["rotated"]


def gptq_(*args, **knobs):
    return gptq(*args, observer=MinMax(), **knobs)


def test_rotations_and_smoothing_nest():
    """And folded tensors of the inner method win: they are what is served."""
    model = spiky()
    seen = []

    def inner(rotated_model, *args, **knobs):
        seen.append(rotated_model)
        return smoothquant(rotated_model, *args, observer=MinMax(), alphas=[0.5], **knobs)

    changes = rotate(model, recipe(3), DATA, observer=MinMax(), then=inner)
    alone = smoothquant(seen[0], recipe(3), DATA, observer=MinMax(), alphas=[0.5])
    assert all(torch.equal(changes.folded[name], value) for name, value in alone.folded.items())
    graphs = [apply(model, changes.tensors, changes.folded), apply(seen[0], alone.tensors, alone.folded)]
    first, second = (graph(input_ids=DATA[0]).logits for graph in graphs)
    assert torch.allclose(first, second, atol=1e-4)


def test_what_the_recipe_leaves_alone_is_rotated_too_and_stored():
    model = tiny(tied=False)
    rules = Recipe(recipe(8).rules | {"down": Rule(".*down_proj", None)})
    changes = rotate(model, rules, [], observer=MinMax())
    assert sum("down_proj" in name for name in changes.folded) == 2
    assert all(value.dtype == torch.bfloat16 for value in changes.folded.values())
    assert divergence(model, apply(model, changes.tensors, changes.folded), DATA) < 0.02


def test_a_tied_head_is_refused_by_name():
    with pytest.raises(ValueError, match=r"model\.norm: its weight is not one number"):
        rotate(tiny(), recipe(), [], observer=MinMax())
    assert rotate(tiny(), recipe(), [], observer=MinMax(), residual=False).folded == {}
