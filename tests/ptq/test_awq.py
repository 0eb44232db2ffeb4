"""AWQ: folding keeps the function, the identity is never beaten by something worse, salient channels are found."""

import copy

import pytest
import torch
from tiny import recipe, scheme, tiny
from transformers import Qwen2Config, Qwen2ForCausalLM

from qat.models.llama import LLAMA
from qat.nn.observers.minmax import MinMax
from qat.numerics.recipe import Recipe, Rule
from qat.ptq.awq import absorbed, awq, candidate, clipped_range, fold
from qat.ptq.rtn import rtn
from qat.surgery.convert import apply
from qat.surgery.walk import Block


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


def block_of(model, index=0):
    return Block(f"model.layers.{index}", copy.deepcopy(model.model.layers[index]), [], [], model.model.layers[index])


@pytest.mark.parametrize("smoothing", LLAMA.smoothings, ids=lambda s: s.previous)
@pytest.mark.parametrize("biased", [False, True])
def test_folding_leaves_the_function_alone(smoothing, biased):
    """In fp64 and without quantization the logits do not move; GQA and biases included."""
    if biased:
        config = Qwen2Config(
            vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, initializer_range=0.2,
        )  # fmt: skip
        model = Qwen2ForCausalLM(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_()
    else:
        model = tiny()
    model = model.double()
    ids = torch.randint(0, 256, (2, 16))
    before = model(input_ids=ids).logits
    block = Block("model.layers.0", model.model.layers[0], [], [], model.model.layers[0])
    names = {n for s in LLAMA.smoothings for n in s.linears}
    weights = {n: block.module.get_parameter(f"{n}.weight").detach().clone() for n in names}
    size = weights[smoothing.linears[0]].shape[1]
    scales = absorbed(block, smoothing, torch.rand(size) * 3 + 0.2, torch.float64).double()
    assert scales.std() > 0.1
    with torch.no_grad():
        fold(block, smoothing, weights, scales, torch.float64)
    assert torch.allclose(model(input_ids=ids).logits, before, rtol=0, atol=1e-9)


def test_a_norm_absorbs_exactly_what_its_rounded_weight_says():
    model = tiny()
    block, smoothing = block_of(model), LLAMA.smoothings[0]
    wanted = torch.rand(64) * 3 + 0.2
    scales = absorbed(block, smoothing, wanted, torch.bfloat16)
    assert torch.allclose(scales, wanted, rtol=2**-8)
    weights = {n: block.module.get_parameter(f"{n}.weight").clone() for n in smoothing.linears}
    old = block.module.input_layernorm.weight.clone()
    with torch.no_grad():
        changed = fold(block, smoothing, weights, scales, torch.bfloat16)
    stored = changed["model.layers.0.input_layernorm.weight"]
    assert stored.dtype == torch.bfloat16
    assert torch.allclose(stored.float() * scales, old, rtol=1e-6)


def test_a_value_channel_takes_the_geometric_mean_of_what_its_query_heads_want():
    model = tiny()
    block, smoothing = block_of(model), next(one for one in LLAMA.smoothings if one.repeats)
    wanted = torch.rand(64) * 3 + 0.2
    scales = absorbed(block, smoothing, wanted, torch.float64).reshape(2, 2, 16)  # kv heads, queries of each, channels
    heads = wanted.reshape(2, 2, 16)
    assert torch.equal(scales[:, 0], scales[:, 1])
    assert torch.allclose(scales[:, 0], (heads[:, 0] * heads[:, 1]).sqrt())


def test_no_mapping_ends_worse_than_rtn_and_the_model_is_left_alone():
    model = uneven()
    before = copy.deepcopy(model.state_dict())
    changes = awq(model, recipe(3), batches(), observer=MinMax(), grid=6)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert len(changes.layers) == 2 * len(LLAMA.smoothings)
    assert all(row["loss"] <= row["identity"] for row in changes.layers)
    assert any(row["loss"] < row["identity"] for row in changes.layers)
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in changes.folded} <= {
        "input_layernorm",
        "post_attention_layernorm",
    }
    assert all(v.dtype == torch.bfloat16 for v in changes.folded.values())


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


def test_a_clipped_range_never_loses_to_the_full_one():
    weight, x = torch.randn(16, 64), torch.randn(100, 64) @ torch.randn(64, 64)
    gram = x.T @ x / 100
    for s in (scheme(2), scheme(3), scheme(3, symmetric=False)):
        lo, hi = clipped_range(weight, gram, s, torch.bfloat16)
        from qat.numerics.affine import dequantize, qparams, quantize, ranges

        errors = []
        for bounds in ((lo, hi), ranges(weight, s)):
            scale, zero = qparams(*bounds, s, torch.bfloat16)
            change = (dequantize(quantize(weight, scale, zero, s.grid), scale, zero, torch.float32) - weight).view(
                16, 2, 32
            )
            errors.append(torch.stack([(x.view(100, 2, 32)[:, g] @ change[:, g].T).square().mean(0) for g in (0, 1)]))
        assert bool((errors[0] <= errors[1] * (1 + 1e-4)).all())
        assert errors[0].sum() < 0.95 * errors[1].sum()


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
