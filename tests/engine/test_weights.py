"""Linears of one input are fused where they can be, and served one by one where they cannot."""

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny import scattered
from transformers import AutoConfig

from qat.engine.layers import Concatenated, Linear
from qat.engine.weights import Weights
from qat.formats import compressed_tensors
from qat.formats.base import load_plain
from qat.nn.packed_embedding import PackedEmbedding
from qat.nn.packed_linear import PackedLinear
from qat.numerics.affine import rtn
from qat.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from qat.numerics.grid import FloatGrid, IntGrid
from qat.numerics.qtensor import QuantizedTensor
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme
from qat.surgery.convert import apply

NAME = "model.layers.0.self_attn"
QKV = {"q_proj": 64, "k_proj": 32, "v_proj": 32}
W4 = Scheme(IntGrid(4), PerGroup(32), convention="signed")
W4_ASYM = Scheme(IntGrid(4), PerGroup(32), symmetric=False)
W8 = Scheme(IntGrid(8), PerChannel())
W8_TENSOR = Scheme(IntGrid(8), PerTensor())


def opened(path: Path, reference: bool = True) -> Weights:
    checkpoint = (compressed_tensors.load if "packed" in path.name else load_plain)(path)
    return Weights(checkpoint, AutoConfig.from_pretrained(path), torch.device("cpu"), torch.float32, reference)


@pytest.mark.parametrize(
    ("schemes", "kind"),
    [
        ([None, None, None], Linear),
        ([W4, W4, W4], PackedLinear),
        ([W4_ASYM, W4_ASYM, W4_ASYM], PackedLinear),
        ([W4, W8, W4], Concatenated),
        ([W8_TENSOR, W8_TENSOR, W8_TENSOR], Concatenated),
        ([W4, None, W4], Concatenated),
    ],
    ids=str,
)
def test_fusion(saved: Callable, tmp_path: Path, schemes: list[Scheme | None], kind: type) -> None:
    model = copy.deepcopy(saved("qwen2").model)
    weights = {n: model.get_submodule(f"{NAME}.{n}").weight.data for n in QKV}
    tensors = {
        f"{NAME}.{n}": QuantizedTensor(*rtn(weights[n], scheme, torch.bfloat16), scheme, tuple(weights[n].shape))
        for n, scheme in zip(QKV, schemes, strict=True)
        if scheme is not None
    }
    rules = {name: Rule(name.replace(".", r"\."), tensor.scheme) for name, tensor in tensors.items()}
    path = tmp_path / ("packed" if tensors else "plain")
    if tensors:
        compressed_tensors.save(path, model, Recipe(rules), tensors, {}, None)
    else:
        model.save_pretrained(path)
    layer = opened(path).linear(NAME, QKV, 64, bias=True)
    assert type(layer) is kind
    x = torch.randn(3, 64)
    expected = []
    for name in QKV:
        module = model.get_submodule(f"{NAME}.{name}")
        tensor = tensors.get(f"{NAME}.{name}")
        weight = module.weight if tensor is None else tensor.dequantize(torch.float32)
        expected.append(torch.nn.functional.linear(x, weight, module.bias))
    torch.testing.assert_close(layer(x), torch.cat(expected, -1))


A8 = Scheme(IntGrid(8), PerToken(), dynamic=True)
STATIC = Scheme(IntGrid(8), PerTensor())
NVFP4 = Scheme(FloatGrid("e2m1"), PerGroup(16), scale_dtype="float8_e4m3fn")
MXFP8 = Scheme(FloatGrid("e4m3"), PerGroup(32), scale_dtype="float8_e8m0fnu")


@pytest.mark.parametrize(
    ("weight", "inputs", "scales", "divisors", "kind"),
    [
        (W8, [A8, A8, A8], None, None, PackedLinear),
        (W8, [A8, None, A8], None, None, Concatenated),
        (W8, [A8, replace(A8, convention="vllm"), A8], None, None, Concatenated),
        (W8, [STATIC] * 3, [0.5, 0.5, 0.5], None, PackedLinear),
        (W8, [STATIC] * 3, [0.5, 0.5, 0.25], None, Concatenated),
        (NVFP4, [None] * 3, None, [100.0] * 3, PackedLinear),
        (NVFP4, [None] * 3, None, [100.0, 100.0, 200.0], Concatenated),
        (MXFP8, [replace(MXFP8, dynamic=True)] * 3, None, None, PackedLinear),
    ],
)
def test_linears_are_fused_where_input_and_divisor_are_one(
    saved: Callable, tmp_path: Path, weight: Scheme, inputs: list, scales: list, divisors: list, kind: type
) -> None:
    model = copy.deepcopy(saved("qwen2").model)
    tensors, folded, rules = {}, {}, {}
    for i, (part, input) in enumerate(zip(QKV, inputs, strict=True)):
        name, w = f"{NAME}.{part}", model.get_submodule(f"{NAME}.{part}").weight.data
        g = None if divisors is None else torch.tensor([divisors[i]])
        tensors[name] = QuantizedTensor(*rtn(w, weight, torch.bfloat16, g), weight, tuple(w.shape), g)
        rules[name] = Rule(name.replace(".", r"\."), weight, input)
        if scales is not None:
            folded[f"{name}.input_scale"] = torch.tensor([scales[i]], dtype=torch.bfloat16)
    compressed_tensors.save(tmp_path / "packed", model, Recipe(rules), tensors, folded, None)
    weights = opened(tmp_path / "packed")
    layer = weights.linear(NAME, QKV, 64, bias=True)
    assert type(layer) is kind
    assert not any(NAME in name and "layers.0" in name and "o_proj" not in name for name in weights._left)
    graph, x = apply(model, tensors, folded, recipe=Recipe(rules)), torch.randn(3, 64)
    expected = [graph.get_submodule(name)(x) for name in tensors]
    torch.testing.assert_close(layer(x), torch.cat(expected, -1))


@pytest.mark.parametrize(("seeds", "kind"), [((1, 1, 1), PackedLinear), ((1, 1, 2), Concatenated)])
def test_linears_are_fused_where_their_groups_are_of_the_same_in_features(
    saved: Callable, tmp_path: Path, seeds: tuple[int, ...], kind: type
) -> None:
    model, tensors = copy.deepcopy(saved("qwen2").model), {}
    for part, seed in zip(QKV, seeds, strict=True):
        w = model.get_submodule(f"{NAME}.{part}").weight.data
        packed = QuantizedTensor(*rtn(w, W4, torch.bfloat16), W4, tuple(w.shape))
        tensors[f"{NAME}.{part}"] = scattered(packed, seed)
    rules = Recipe({"qkv": Rule("|".join(tensors).replace(".", r"\."), W4)})
    compressed_tensors.save(tmp_path / "packed", model, rules, tensors, {}, None)
    layer, x = opened(tmp_path / "packed").linear(NAME, QKV, 64, bias=True), torch.randn(3, 64)
    assert type(layer) is kind
    graph = apply(model, tensors, {})
    torch.testing.assert_close(layer(x), torch.cat([graph.get_submodule(name)(x) for name in tensors], -1))


def test_faster_layouts_stay_within_what_is_spare(saved: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved("llama", "w4_g32").path
    packed = path.parent / "packed_link"
    if not packed.exists():
        packed.symlink_to(path)
    offered: list[int] = []

    def grow(layer: PackedLinear, spare: int) -> None:
        offered.append(spare)
        if spare >= 1000:
            layer.bias = torch.zeros(250)  # a layout of 1000 bytes more

    monkeypatch.setattr(PackedLinear, "specialize", grow)
    weights = opened(packed, reference=False)
    for _ in range(12):
        weights.linear(NAME, QKV, 64)
    assert offered[0] == int(0.08 * weights.file_bytes)
    assert all(b == (a - 1000 if a >= 1000 else a) for a, b in pairwise(offered))


def test_what_is_served_plain_only_is_refused_quantized(saved: Callable, tmp_path: Path) -> None:
    path = tmp_path / "packed"
    path.symlink_to(saved("qwen2", "w4_g32").path)
    with pytest.raises(ValueError, match=rf"model\.safetensors: {NAME}\.q_proj is quantized; it is served plain only"):
        opened(path).vector(f"{NAME}.q_proj.weight", 64)


@pytest.mark.parametrize(("family", "tied"), [("qwen2", False), ("llama", True)])
def test_a_packed_embedding_is_its_tied_heads_linear(saved: Callable, tmp_path: Path, family: str, tied: bool) -> None:
    checkpoint = saved(family, "w4_embed8")
    (tmp_path / "packed").symlink_to(checkpoint.path)
    for reference in (True, False):
        weights = opened(tmp_path / "packed", reference)
        embedding = weights.embedding("model.embed_tokens", 256, 64)
        head = weights.head(embedding)
        assert isinstance(embedding, PackedEmbedding)
        assert (head is embedding.linear) is tied
        ids = torch.tensor([255, 0, 7, 7])
        expected = checkpoint.model.get_input_embeddings().weight[ids]
        assert torch.equal(embedding(ids, torch.float32), expected)
    with pytest.raises(ValueError, match=r"tensor model\.embed_tokens is .*; config\.json asks for"):
        opened(tmp_path / "packed").embedding("model.embed_tokens", 255, 64)


def test_a_quantized_head_is_served(saved: Callable, tmp_path: Path) -> None:
    model = copy.deepcopy(saved("qwen2").model)
    tensor = QuantizedTensor(*rtn(model.lm_head.weight.data, W4, torch.bfloat16), W4, (256, 64))
    compressed_tensors.save(
        tmp_path / "packed", model, Recipe({"all": Rule("lm_head", W4)}), {"lm_head": tensor}, {}, None
    )
    weights = opened(tmp_path / "packed")
    head = weights.head(weights.embedding("model.embed_tokens", 256, 64))
    x = torch.randn(2, 64)
    torch.testing.assert_close(head(x), x @ tensor.dequantize(torch.float32).T)
