"""WinQ: masters move to their cells' centres, and nothing that is served moves with them."""

import copy

import pytest
import torch
from tiny import tiny

from qat.nn.estimators import Clipped, EfficientQAT
from qat.nn.observers.mse import MSE
from qat.numerics.granularity import PerChannel, PerGroup
from qat.numerics.grid import Codebook, FloatGrid, IntGrid
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme
from qat.surgery.convert import convert
from qat.surgery.prepare import fake_quants, prepare, set_strength
from qat.training.winq import WinQ, reinitialise

GRIDS = {
    "int2": Scheme(IntGrid(2), PerGroup(16)),
    "int3 asymmetric": Scheme(IntGrid(3), PerGroup(16), symmetric=False),
    "int8": Scheme(IntGrid(8), PerChannel()),
    "ternary": Scheme(Codebook("ternary"), PerGroup(16)),
    "seq2": Scheme(Codebook("seq2"), PerGroup(16)),
    "nf4": Scheme(Codebook("nf4"), PerGroup(16)),
    "fp8": Scheme(FloatGrid("e4m3"), PerChannel()),
    "nvfp4": Scheme(FloatGrid("e2m1"), PerGroup(16), scale_dtype="float8_e4m3fn"),
}


def prepared(scheme, estimator=None):
    """With masters beyond the outermost levels too."""
    model = tiny(layers=1)
    prepare(model, Recipe({"a": Rule(".*_proj", scheme)}), MSE(), estimator or Clipped())
    with torch.no_grad():
        for linear in fake_quants(model).values():
            linear.weight.mul_(1.5)
    return model


@pytest.mark.parametrize("scheme", GRIDS.values(), ids=GRIDS)
def test_no_code_changes_while_masters_go_the_way_that_alpha_says(scheme):
    before = prepared(scheme)
    set_strength(before, 0.25)  # as on a ramp
    tensors, _ = convert(before)
    for alpha in (0.2, 0.5, 0.8, 1.0):
        model = copy.deepcopy(before)
        reinitialise(model, alpha)
        again, _ = convert(model)
        for name, linear in fake_quants(model).items():
            assert torch.equal(again[name].codes, tensors[name].codes)
            assert torch.equal(again[name].scale, tensors[name].scale)
            w, q = before.get_parameter(f"{name}.weight"), tensors[name].dequantize(torch.float32)
            assert not torch.equal(linear.weight, w)
            assert torch.allclose(linear.weight, (1 - alpha) * w + alpha * q, rtol=1e-5, atol=1e-7), alpha
            assert alpha < 1 or torch.equal(linear.weight, q)


def test_only_masters_that_train_move():
    model = prepared(GRIDS["int3 asymmetric"], EfficientQAT())
    fixed = model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    reinitialise(model, 0.5)
    moved = [name for name, value in model.state_dict().items() if not torch.equal(value, before[name])]
    assert moved == [f"{name}.weight" for name, m in fake_quants(model).items() if m.weight is not fixed]


@pytest.mark.parametrize(
    ("every", "alpha", "words"),
    [(0, 0.5, "winq.every=0"), (5, 0.0, "winq.alpha=0.0"), (5, 1.5, "winq.alpha=1.5"), (5, float("nan"), "alpha=nan")],
)
def test_values_out_of_range_are_refused(every, alpha, words):
    with pytest.raises(ValueError, match=words):
        WinQ(every, alpha)
