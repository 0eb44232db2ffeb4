"""SmoothQuant: smoothing keeps the function, the identity is RTN and never beaten by worse, outliers are found."""

import copy

import pytest
import torch
from tiny import recipe, scheme, tiny
from tiny_families import KINDS, family

from qat.models.families import structure_of
from qat.models.llama import LLAMA
from qat.nn.observers.ema import EMA
from qat.nn.observers.minmax import MinMax
from qat.nn.observers.mse import MSE
from qat.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from qat.numerics.grid import IntGrid
from qat.numerics.kv import KINDS as CACHES
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme
from qat.ptq import smoothquant as module
from qat.ptq.gptq import gptq
from qat.ptq.rtn import rtn
from qat.ptq.smoothquant import divergence, smoothed, smoothquant
from qat.surgery.calibrate import calibrate
from qat.surgery.convert import apply, quantize_inputs
from qat.surgery.match import match

NORMS = [s.previous for s in LLAMA.smoothings if "norm" in s.previous]
DYNAMIC = Scheme(IntGrid(8), PerToken(), dynamic=True)
STATIC = Scheme(IntGrid(8), PerTensor(), symmetric=False)


def inputs(scheme=DYNAMIC, bits=8):
    return Recipe({"linears": Rule(".*_proj", Scheme(IntGrid(bits), PerChannel()), scheme)})


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def batches(n=4, length=24):
    return list(torch.randint(0, 256, (n, length)).split(2))


def outliers(model=None, factor=64):
    """Four channels of every norm carry most of the activation, through weights that are as much smaller."""
    model = model or tiny()
    with torch.no_grad():
        for layer in model.model.layers:
            for smoothing in LLAMA.smoothings:
                if smoothing.previous in NORMS:
                    layer.get_parameter(f"{smoothing.previous}.weight")[:4] *= factor
                    for name in smoothing.linears:
                        layer.get_parameter(f"{name}.weight")[:, :4] /= factor
    return model


@pytest.mark.parametrize("name", KINDS)
def test_smoothing_leaves_the_function_alone(name):
    """In fp64 and without quantization the logits do not move: GQA, biases and Gemma's norms included."""
    model, structure = family(name), structure_of(KINDS[name][0])
    plan, ids = match(model, recipe()), torch.randint(0, 256, (2, 16))
    scales = {f"model.layers.{i}.{norm}": torch.rand(64).double() * 3 + 0.2 for i in range(2) for norm in NORMS}
    moved = smoothed(model, plan, structure, scales, torch.float64)
    assert len(moved) == 2 * (2 + 5)
    assert sum(name.endswith("norm.weight") for name in moved) == 4
    before, after = model(input_ids=ids).logits, apply(model, {}, moved)(input_ids=ids).logits
    assert not torch.equal(after, before)
    assert torch.allclose(after, before, rtol=0, atol=1e-10)


@pytest.mark.parametrize("rules", [recipe(3), inputs(), inputs(STATIC)], ids=["w3", "w8a8", "w8a8_static"])
def test_law_c_the_identity_is_rtn(rules):
    model, data = tiny(), batches()
    changes, nearest = (
        smoothquant(model, rules, data, observer=MSE(4), alphas=[]),
        rtn(model, rules, [], observer=MSE(4)),
    )
    assert not changes.folded
    assert changes.layers[0]["alpha"] is None
    for name, tensor in nearest.tensors.items():
        assert torch.equal(changes.tensors[name].codes, tensor.codes)
        assert torch.equal(changes.tensors[name].scale, tensor.scale)


@pytest.mark.parametrize("rules", [inputs(), inputs(STATIC), inputs(bits=4)], ids=["w8a8", "w8a8_static", "w4a8"])
def test_planted_outliers_are_smoothed_and_kept_better(rules):
    model, data = outliers(), batches()
    before = copy.deepcopy(model.state_dict())
    changes = smoothquant(model, rules, data, observer=MinMax(), alphas=[0.5, 0.8], input_observer=EMA())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    row = changes.layers[0]
    assert row["alpha"] is not None
    assert row["loss"] < 0.5 * row["identity"]
    assert changes.folded.keys() == {f"model.layers.{i}.{norm}.weight" for i in range(2) for norm in NORMS}
    for name, folded in changes.folded.items():
        assert folded.dtype == torch.bfloat16
        scales = before[name] / folded.float()
        assert float(scales[:4].min()) > 4 * float(scales[4:].max())


def test_the_winner_has_the_least_divergence_as_served(monkeypatch):
    """Judged anew, from what comes back, with inputs and cache as the recipe says."""
    model, data = outliers(factor=8), batches()
    rules = Recipe(inputs(bits=4).rules, CACHES["int4"])
    row = {}
    for alphas in ([], [0.4], [0.7], [0.4, 0.7]):
        changes = smoothquant(model, rules, data, observer=MinMax(), alphas=alphas)
        served = apply(model, changes.tensors, changes.folded, recipe=rules)
        row[tuple(alphas)] = changes.layers[0]["loss"]
        assert changes.layers[0]["loss"] == pytest.approx(divergence(model, served, data), rel=1e-6)
        assert changes.layers[0]["loss"] <= changes.layers[0]["identity"]
        assert changes.layers[0]["identity"] == row[()]
    assert row[(0.4, 0.7)] == min(row.values())
    assert row[(0.4,)] != row[(0.7,)]


def test_scales_are_equation_4_over_all_batches_and_all_linears_of_a_norm():
    """`s_j = max|X_j|^a / max|W_j|^(1-a)`, seen in the norms that absorbed it."""
    model, data, heard = outliers(), batches(), {}
    changes = smoothquant(model, inputs(bits=4), data, observer=MinMax(), alphas=[0.7])
    assert changes.layers[0]["alpha"] == 0.7
    seen = copy.deepcopy(model)
    for name in changes.folded:
        norm = name.removesuffix(".weight")
        seen.get_submodule(norm).register_forward_hook(
            lambda _, args, out, key=name: heard.setdefault(key, []).append(out)
        )
    for ids in data:
        seen(input_ids=ids)
    for name, found in changes.folded.items():
        block, _, norm = name.removesuffix(".weight").rpartition(".")
        (linears,) = (s.linears for s in LLAMA.smoothings if s.previous == norm)
        columns = torch.stack([model.get_parameter(f"{block}.{linear}.weight").abs().amax(0) for linear in linears])
        x, w = torch.cat(heard[name]).flatten(0, 1).abs().amax(0), columns.amax(0)
        assert int((columns[0] < w).sum()) > 8
        expected = model.get_parameter(name) * w.pow(0.3) / x.pow(0.7)
        assert torch.allclose(found.float(), expected, rtol=2**-8)  # rounded to bf16


def test_static_ranges_are_calibrated_on_all_batches():
    """Three batches that differ: the loss is that of a model whose ranges saw them all."""
    model, rules = outliers(factor=8), inputs(STATIC)
    data = list(torch.randint(0, 256, (3, 24)).split(1))
    changes = smoothquant(model, rules, data, observer=MinMax(), alphas=[])
    served = apply(model, changes.tensors, changes.folded)
    quantize_inputs(served, rules, {})
    calibrate(served, data)
    assert changes.layers[0]["loss"] == pytest.approx(divergence(model, served, data), rel=1e-6)


def test_a_strength_that_only_hurts_is_not_taken():
    """Inputs are not quantized at all, and 2-bit weights get their range on top."""
    rules = Recipe({"linears": Rule(".*_proj", Scheme(IntGrid(2), PerGroup(32)))})
    row = smoothquant(outliers(), rules, batches(), observer=MinMax(), alphas=[1.0]).layers[0]
    assert (row["alpha"], row["loss"]) == (None, row["identity"])


def test_then_rounds_the_smoothed_model():
    """And sees what is served: a model of the same function whose norms are those of `folded`."""
    model, data, rules = outliers(), batches(), inputs(bits=4)
    calls = []

    def then(seen, recipe, batches, **knobs):
        calls.append(seen)
        return gptq(seen, recipe, batches, observer=MinMax(), **knobs)

    changes = smoothquant(model, rules, data, observer=MinMax(), alphas=[0.6], then=then)
    (seen,) = calls
    for name, value in changes.folded.items():
        assert torch.equal(seen.get_parameter(name), value.float())
    expected = gptq(seen, rules, data, observer=MinMax())
    assert all(torch.equal(changes.tensors[n].codes, t.codes) for n, t in expected.tensors.items())
    assert changes.layers[1]["name"] == expected.layers[0]["name"]
    assert divergence(model, seen, data) < 1e-3


def test_a_killed_run_goes_on_with_the_scales_that_it_found(tmp_path, monkeypatch):
    model, data = outliers(), batches()
    first = smoothquant(model, inputs(), data, observer=MinMax(), alphas=[0.5], store=tmp_path / "s")
    monkeypatch.setattr(module, "_search", None)
    again = smoothquant(model, inputs(), data, observer=MinMax(), alphas=[0.5], store=tmp_path / "s")
    assert again.layers[0] == first.layers[0]
    assert all(torch.equal(again.folded[name], value) for name, value in first.folded.items())
    assert all(torch.equal(again.tensors[name].codes, tensor.codes) for name, tensor in first.tensors.items())


def test_what_is_not_all_quantized_is_not_smoothed():
    rules = Recipe({"all": Rule(".*_proj", scheme(4), DYNAMIC), "v": Rule(".*v_proj", None)})
    changes = smoothquant(outliers(), rules, batches(), observer=MinMax(), alphas=[0.5])
    assert {name.split(".")[3] for name in changes.folded} == {"post_attention_layernorm"}


def test_what_cannot_be_searched_is_refused():
    with pytest.raises(ValueError, match=r"alphas: 1.5: a migration strength is from 0"):
        smoothquant(tiny(), inputs(), batches(), observer=MinMax(), alphas=[0.5, 1.5])
    with pytest.raises(ValueError, match="there are no calibration batches"):
        smoothquant(tiny(), inputs(), [], observer=MinMax())
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight[3] = float("inf")
    with pytest.raises(ValueError, match=r"model\.layers\.1\.input_layernorm: its outputs are not finite"):
        smoothquant(model, inputs(), batches(), observer=MinMax())
