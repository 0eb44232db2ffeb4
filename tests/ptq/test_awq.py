"""AWQ: folding keeps the function, the identity is never beaten by something worse, salient channels are found."""

import copy

import pytest
import torch
from tiny import recipe, scheme, tiny
from tiny_grids import RECIPES

from qat.models.llama import LLAMA
from qat.nn.observers.minmax import MinMax
from qat.nn.observers.mse import MSE
from qat.numerics.affine import qparams, quantize
from qat.numerics.granularity import PerChannel
from qat.numerics.grid import IntGrid
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme
from qat.ptq import awq as module
from qat.ptq.awq import UNHEARD, awq, candidate, relative_magnitude
from qat.ptq.awq_clip import clipped_range
from qat.ptq.rtn import rtn
from qat.surgery.convert import apply


def batches(n=4, length=24):
    return list(torch.randint(0, 256, (n, length)).split(2))


def uneven():
    """A tiny model in which a few channels carry much activation through small weights, as in real ones."""
    model = tiny()
    with torch.no_grad():
        for layer in model.model.layers:
            for smoothing in (LLAMA.smoothings[0], LLAMA.smoothings[2], LLAMA.smoothings[3]):
                channels = torch.randperm(64)[:4]
                layer.get_parameter(f"{smoothing.previous}.weight")[channels] *= 16
                for name in smoothing.linears:
                    layer.get_parameter(f"{name}.weight")[:, channels] /= 16
    return model


@pytest.mark.parametrize("observer", [MinMax(), MSE(10, 0.5)], ids=["minmax", "mse"])
@pytest.mark.parametrize("duo", [True, False, "both"])
def test_no_mapping_ends_worse_than_rtn_and_the_model_is_left_alone(duo, observer):
    model = uneven()
    before = copy.deepcopy(model.state_dict())
    changes = awq(model, recipe(3), batches(), observer=observer, grid=4, duo_scaling=duo)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert len(changes.layers) == 2 * len(LLAMA.smoothings)
    assert all(row["loss"] <= row["identity"] for row in changes.layers)
    assert any(row["loss"] < row["identity"] for row in changes.layers)
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in changes.folded} <= {
        "input_layernorm",
        "post_attention_layernorm",
    }
    assert all(v.dtype == torch.bfloat16 for v in changes.folded.values())


def test_candidates_of_both_kinds_are_no_worse_than_those_of_one():
    """Of the first mapping, which sees the same inputs in all three searches."""
    data, losses = batches(), {}
    for duo in (True, False, "both"):
        row = awq(uneven(), recipe(3), data, observer=MinMax(), grid=4, duo_scaling=duo).layers[0]
        losses[duo] = row["loss"]
        assert row["duo"] in (None, True, False) if duo == "both" else row["duo"] in (None, duo)
    assert losses["both"] == min(losses[True], losses[False])
    assert losses[True] != losses[False]


def test_an_unknown_kind_of_scaling_is_refused():
    with pytest.raises(ValueError, match="duo_scaling='maybe': one of true, false, both"):
        awq(tiny(), recipe(), batches(), observer=MinMax(), duo_scaling="maybe")


@pytest.mark.parametrize("symmetric", [True, False])
def test_law_c_without_scales_it_is_rtn(symmetric):
    model = tiny()
    changes = awq(model, recipe(4, symmetric=symmetric), batches(), observer=MinMax(), grid=0)
    nearest = rtn(model, recipe(4, symmetric=symmetric), [], observer=MinMax())
    assert not changes.folded
    for name, tensor in nearest.tensors.items():
        assert torch.equal(changes.tensors[name].codes, tensor.codes)
        assert torch.equal(changes.tensors[name].scale, tensor.scale)


def test_planted_salient_channels_are_scaled_up_and_kept_better():
    model = uneven()
    planted = model.model.layers[0].input_layernorm.weight.abs() > 8
    assert int(planted.sum()) == 4
    changes = awq(model, recipe(3), batches(), observer=MinMax(), duo_scaling=False)
    folded = changes.folded["model.layers.0.input_layernorm.weight"].float()
    scales = model.model.layers[0].input_layernorm.weight.detach() / folded
    assert float(scales[planted].min()) > 2 * float(scales[~planted].median())
    assert changes.layers[0]["loss"] < 0.7 * changes.layers[0]["identity"]


def test_end_to_end_the_output_is_kept_better_than_by_rtn():
    model, data = uneven(), batches(8)
    ids = torch.cat(data)
    full = model(input_ids=ids).logits
    nearest = apply(model, rtn(model, recipe(3), [], observer=MinMax()).tensors, {})(input_ids=ids).logits
    errors = {}
    for clip in (False, True):
        changes = awq(model, recipe(3), data, observer=MinMax(), clip=clip)
        out = apply(model, changes.tensors, changes.folded)(input_ids=ids).logits
        errors[clip] = float((out - full).detach().square().mean())
    assert max(errors.values()) < float((nearest - full).detach().square().mean())
    assert errors[True] != errors[False]


def test_clipping_touches_neither_queries_nor_keys():
    data, found = batches(), {}
    for clip in (False, True):
        found[clip] = awq(tiny(), recipe(2), data, observer=MinMax(), grid=2, clip=clip).tensors
    moved = {n for n, t in found[True].items() if not torch.equal(t.scale, found[False][n].scale)}
    assert moved == {n for n in found[True] if not n.endswith(("q_proj", "k_proj"))}


@torch.no_grad()
def heard_by(model, names, data):
    """What modules are called with, and what they answer, over all batches."""
    calls = {name: [] for name in names}
    for name, heard in calls.items():
        hook = lambda _, args, kwargs, out, heard=heard: heard.append((args, kwargs, out))  # noqa: E731
        model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
    for ids in data:
        model(input_ids=ids)
    return calls


@pytest.mark.parametrize("rules", [recipe(3), RECIPES["nvfp4"]], ids=["int3", "nvfp4"])
@torch.no_grad()
def test_the_identitys_loss_is_that_of_round_to_nearest(rules):
    """Of what each mapping's module computes; divisors of query, key and value, and of gate and up, are shared."""
    model, data = tiny(layers=1), batches()
    changes, nearest = awq(model, rules, data, observer=MinMax(), grid=0), rtn(model, rules, [], observer=MinMax())
    calls = heard_by(copy.deepcopy(model), [f"model.layers.0.{s.inspect}" for s in LLAMA.smoothings], data)
    for row, smoothing in zip(changes.layers, LLAMA.smoothings, strict=True):
        rounded, inspect, errors = copy.deepcopy(model), f"model.layers.0.{smoothing.inspect}", []
        for name in (f"model.layers.0.{linear}" for linear in smoothing.linears):
            rounded.get_parameter(f"{name}.weight").copy_(nearest.tensors[name].dequantize(torch.float32))
        for args, kwargs, out in calls[inspect]:
            own = rounded.get_submodule(inspect)(*args, **kwargs)
            pairs = [(x[0] if isinstance(x, tuple) else x).double() for x in (own, out)]
            errors.append((pairs[0] - pairs[1]).square().flatten())
        assert row["loss"] == row["identity"] == pytest.approx(float(torch.cat(errors).mean()), rel=1e-4)


@torch.no_grad()
def test_what_is_rounded_was_scaled_its_range_clipped_on_the_scaled_inputs_and_its_divisor_shared():
    """Gate and query from `folded` alone: `W s`, and what arrives once the norm was divided by s."""
    model, data = uneven(), batches()
    for rules in (recipe(3), RECIPES["nvfp4"]):
        changes = awq(model, rules, data, observer=MinMax(), grid=4, clip=True)
        for first, *others in (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("mlp.gate_proj", "mlp.up_proj"),
        ):
            g = changes.tensors[f"model.layers.0.{first}"].global_scale
            for other in others:
                assert g is None or torch.equal(changes.tensors[f"model.layers.0.{other}"].global_scale, g)
        gate, norm = "model.layers.0.mlp.gate_proj", "model.layers.0.post_attention_layernorm.weight"
        s = model.get_parameter(norm) / changes.folded[norm].float()
        assert float(s.max() / s.min()) > 2
        calls = heard_by(apply(model, {}, {norm: changes.folded[norm]}), [gate], data)[gate]
        x = torch.cat([args[0].flatten(0, 1) for args, _, _ in calls])
        tensor, weight = changes.tensors[gate], model.get_parameter(f"{gate}.weight") * s
        knobs = tensor.scheme, MinMax(), torch.bfloat16, tensor.global_scale
        scale, _ = qparams(*clipped_range(weight, x.T @ x / len(x), *knobs), knobs[0], *knobs[2:])
        assert torch.equal(tensor.scale.float(), scale.float())
        assert torch.equal(tensor.codes, quantize(weight, scale, None, knobs[0].grid, knobs[3]))


@pytest.mark.parametrize(("grid", "ratios"), [(1, [0]), (3, [0, 0.5, 1])])
def test_ratios_reach_from_0_to_1(grid, ratios, monkeypatch):
    tried = []
    monkeypatch.setattr(module, "candidate", lambda x, w, ratio, duo: tried.append(ratio) or torch.ones_like(x))
    awq(tiny(layers=1), recipe(3), batches(), observer=MinMax(), grid=grid)
    assert tried == ratios * len(LLAMA.smoothings)


def test_an_output_that_overflows_names_the_mapping():
    model = tiny(layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight *= 1e38
    where = (
        r"^model\.layers\.0\.post_attention_layernorm -> mlp\.gate_proj, mlp\.up_proj: rounded to nearest, its output"
    )
    with pytest.raises(ValueError, match=where):
        awq(model, recipe(3), batches(), observer=MinMax(), grid=2)


def test_relative_magnitude_is_that_of_its_definition():
    """`mean over rows of |w| / max |w| of its group`, rows of all linears together, each with groups of its own."""
    weights = {"a": torch.randn(3, 64), "b": torch.randn(5, 64) * 100}
    schemes = {"a": scheme(4, 16), "b": Scheme(IntGrid(4), PerChannel())}
    rows = [row[i : i + 16].abs() / row[i : i + 16].abs().max() for row in weights["a"] for i in range(0, 64, 16)]
    rows = [*torch.cat(rows).view(3, 64), *(row.abs() / row.abs().max() for row in weights["b"])]
    assert torch.allclose(relative_magnitude(weights, schemes), torch.stack(rows).mean(0), rtol=1e-5)


def test_candidates_are_those_of_equation_5():
    x, w = torch.tensor([1e-6, 0.02, 1.0, 30.0]), torch.tensor([0.3, 0.1, 0.8, 0.5])
    for ratio in (0.0, 0.25, 1.0):
        for duo in (False, True):
            s = x.double() ** ratio / (w.double() ** (1 - ratio) + 1e-4 if duo else 1)
            s = s.clamp(min=1e-4)
            found = candidate(x, w, ratio, duo)
            assert torch.allclose(found.double(), s / (s.max() * s.min()).sqrt(), rtol=1e-5, atol=0)
    small = candidate(torch.tensor([1e-3, 1.0]), w[:2], 1.0, False)
    assert float(small[1] / small[0]) == pytest.approx(1e3, rel=1e-5)  # 0.001 is not clamped


@torch.no_grad()
def test_importance_is_the_mean_magnitude_of_what_a_linear_gets(monkeypatch):
    model, data, seen = tiny(layers=1), batches(), []
    monkeypatch.setattr(module, "candidate", lambda x, w, ratio, duo: seen.append(x.clone()) or torch.ones_like(x))
    awq(model, recipe(3), data, observer=MinMax(), grid=1)
    names = [f"model.layers.0.{smoothing.linears[0]}" for smoothing in LLAMA.smoothings]
    calls = heard_by(model, names, data)
    for name, x_mean in zip(names, seen, strict=True):
        x = torch.cat([args[0].flatten(0, 1) for args, _, _ in calls[name]])
        assert torch.allclose(x_mean, x.abs().mean(0), rtol=1e-5, atol=1e-7), name


def test_candidates_are_centred_and_finite():
    for ratio in (0.0, 0.5, 1.0):
        for duo in (False, True):
            scales = candidate(torch.tensor([0.0, 1e-8, 1.0, 1e4]), torch.tensor([0.1, 0.5, 0.9, 0.0]), ratio, duo)
            assert bool(torch.isfinite(scales).all())
            assert float(scales.max() * scales.min()) == pytest.approx(1.0, rel=1e-3)


def test_what_stays_unquantized_absorbs_nothing():
    """v_proj is left alone, so o_proj has no mapping: a stored bf16 matrix would round the scales away."""
    model = tiny()
    rules = Recipe({"all": Rule(".*_proj", scheme(3)), "v": Rule(".*v_proj", None)})
    changes = awq(model, rules, batches(), observer=MinMax(), grid=4)
    names = [row["name"] for row in changes.layers]
    assert not [n for n in names if "v_proj ->" in n or "input_layernorm" in n]
    assert len(changes.tensors) == 12


def test_a_mapping_that_gets_nothing_but_zeros_is_left_alone_and_reported():
    model = tiny()
    with torch.no_grad():
        model.model.layers[1].input_layernorm.weight.zero_()
    changes = awq(model, recipe(3), batches(), observer=MinMax(), grid=3, clip=True)
    dead = [row["name"].partition(" ")[0] for row in changes.layers if row["fallback"]]
    assert dead == [f"model.layers.1.{name}" for name in ("input_layernorm", "self_attn.v_proj")]
    nearest = rtn(model, recipe(3), [], observer=MinMax()).tensors
    for name in (f"model.layers.1.self_attn.{part}_proj" for part in "qk"):
        assert torch.equal(changes.tensors[name].codes, nearest[name].codes)


def test_a_linear_that_no_token_reaches_is_rounded_to_nearest(monkeypatch):
    model = tiny(layers=1)
    monkeypatch.setattr(type(model.model.layers[0].mlp), "forward", lambda self, x: self.up_proj(x)[..., :64])
    rules = Recipe({"down": Rule(".*(up|down)_proj", scheme(3))})
    changes = awq(model, rules, batches(), observer=MinMax(), grid=3, clip=True)
    nearest = rtn(model, rules, [], observer=MinMax()).tensors
    name = "model.layers.0.mlp.down_proj"
    assert torch.equal(changes.tensors[name].codes, nearest[name].codes)
    assert [row["fallback"] for row in changes.layers if name[15:] in row["name"]] == [UNHEARD]
