"""Law (c) at its simplest: the method RTN is the algebra's RTN, on every module of the recipe and on nothing else."""

import pytest
import torch
from tiny import embedded, recipe, tiny

from qat.nn.observers.minmax import MinMax
from qat.nn.observers.mse import MSE
from qat.numerics.affine import rtn as algebra
from qat.numerics.granularity import PerChannel, PerGroup, PerTensor
from qat.numerics.grid import IntGrid
from qat.numerics.metrics import sqnr
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme
from qat.ptq.rtn import rtn

UP = "model.layers.0.mlp.up_proj"
SCHEMES = [
    Scheme(IntGrid(4), PerGroup(32)),
    Scheme(IntGrid(3), PerGroup(16), symmetric=False),
    Scheme(IntGrid(2), PerChannel()),
    Scheme(IntGrid(8), PerTensor()),
    Scheme(IntGrid(4), PerGroup(32), scale_dtype="float32"),
]


@pytest.fixture(scope="module")
def model():
    return tiny()


def linears(scheme):
    return Recipe({"linears": Rule(".*_proj", scheme)})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: f"{s}-{s.scale_dtype}")
def test_law_c_equals_the_algebra_bit_for_bit(model, scheme, dtype):
    changes = rtn(model, linears(scheme), [], observer=MinMax(), dtype=dtype)
    assert len(changes.tensors) == 14
    assert changes.folded == {}
    for name, tensor in changes.tensors.items():
        codes, scale, zero_point = algebra(model.get_submodule(name).weight, scheme, dtype)
        assert torch.equal(tensor.codes, codes)
        assert torch.equal(tensor.scale, scale)
        assert tensor.scale.dtype == (torch.float32 if scheme.scale_dtype else dtype)
        assert (tensor.zero_point is None) == scheme.symmetric
        assert tensor.zero_point is None or torch.equal(tensor.zero_point, zero_point)


@pytest.mark.parametrize("norm", [1.0, 2.0, 2.4])
@pytest.mark.parametrize("scheme", SCHEMES[:4], ids=str)
def test_a_searched_range_is_never_worse_in_the_error_that_it_weighs(model, scheme, norm):
    """Group by group, since the min-max range is among the candidates; and at few bits it is better somewhere."""
    plain = rtn(model, linears(scheme), [], observer=MinMax())
    searched = rtn(model, linears(scheme), [], observer=MSE(20, 0.3, norm))
    better = 0
    for name, tensor in plain.tensors.items():
        weight = model.get_submodule(name).weight.detach()

        def error(t, weight=weight):
            difference = (t.dequantize(torch.float32) - weight).abs().double().pow(norm)
            return difference.reshape(*t.scale.shape, -1).sum(-1)

        before, after = error(tensor), error(searched.tensors[name])
        assert bool((after <= before * (1 + 1e-5)).all()), name
        better += int((after < before).sum())
    assert better > 0


def test_modules_that_the_recipe_leaves_alone_are_left_alone(model):
    rules = Recipe(recipe().rules | {"first": Rule(r"model\.layers\.0\..*", None)})
    found = rtn(model, rules, [], observer=MinMax()).tensors
    assert len(found) == 7
    assert all(name.startswith("model.layers.1.") for name in found)


def test_an_embedding_is_rounded_under_its_own_name(model):
    tensors = rtn(model, embedded(), [], observer=MinMax()).tensors
    assert len(tensors) == 15
    tensor = tensors["model.embed_tokens"]
    codes, scale, _ = algebra(model.lm_head.weight, tensor.scheme, torch.bfloat16)
    assert torch.equal(tensor.codes, codes)
    assert torch.equal(tensor.scale, scale)


def test_the_model_is_left_as_it_is(model):
    before = {name: p.clone() for name, p in model.named_parameters()}
    rtn(model, recipe(2), [], observer=MSE(4))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_each_module_is_reported_with_its_error(model):
    changes = rtn(model, recipe(3), [], observer=MinMax())
    assert [row["name"] for row in changes.layers] == list(changes.tensors)
    first = changes.layers[0]
    weight = model.get_submodule(first["name"]).weight.detach()
    assert first["sqnr_db"] == pytest.approx(sqnr(weight, changes.tensors[first["name"]].dequantize(torch.float32)))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_named(bad):
    model = tiny()
    model.get_submodule(UP).weight.data[3, 5] = bad
    with pytest.raises(ValueError, match=f"{UP}: a scale is not finite"):
        rtn(model, recipe(), [], observer=MinMax())
