"""The engines' own conditions, as a table; every refusal names the layer, the value and the fix."""

import re
from dataclasses import replace

import pytest

from qat.formats.targets import ENGINES, READS, Layer, verdicts, whole
from qat.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from qat.numerics.grid import Codebook, FloatGrid, IntGrid
from qat.numerics.kv import KINDS
from qat.numerics.scheme import E4M3, E8M0, Scheme

CT = "compressed_tensors"
DEQUANTIZE = "CompressedTensorsConfig(dequantize=True)"
TOKEN = Scheme(IntGrid(8), PerToken(), dynamic=True)
FLOAT_TOKEN = Scheme(FloatGrid("e4m3"), PerToken(), dynamic=True)
NVFP4 = Scheme(FloatGrid("e2m1"), PerGroup(16), scale_dtype=E4M3)


def ints(bits=4, size=64, symmetric=True):
    return Scheme(IntGrid(bits), PerGroup(size) if size > 0 else PerChannel(), symmetric)


def one(target, weight, shape=(128, 256), input=None, name=CT, dtype="bfloat16", module="model.layers.0.mlp.down_proj"):
    (verdict,) = verdicts(target, name, [Layer(module, shape, weight, input)], dtype)
    return verdict


@pytest.mark.parametrize(
    ("target", "weight", "shape", "kernel"),
    [
        ("vllm", ints(), (128, 256), "Machete (Hopper) or Marlin"),
        ("vllm", ints(8, -1), (128, 64), "Machete (Hopper) or Marlin"),
        ("vllm", ints(), (576, 576), "Marlin"),  # 576 is no multiple of 128
        ("vllm", ints(size=32), (128, 256), "Marlin"),
        ("vllm", ints(symmetric=False), (192, 576), "Marlin"),
        ("vllm", ints(8, symmetric=False), (128, 256), "Machete (Hopper)"),
        ("sglang", ints(), (64, 128), "Marlin"),
        ("sglang", ints(size=-1, symmetric=False), (64, 128), "Marlin"),
        ("vllm", Scheme(Codebook("ternary"), PerGroup(64)), (128, 256), "Humming, whether it loads is not known"),
        ("vllm", Scheme(FloatGrid("e4m3"), PerChannel()), (128, 256), "FP8 weights alone, Marlin"),
        ("vllm", Scheme(FloatGrid("e4m3"), PerGroup(32)), (128, 256), "not known"),
        ("vllm", NVFP4, (128, 256), "FP4, which kernel is not known"),
        ("vllm", Scheme(FloatGrid("e4m3"), PerGroup(32), scale_dtype=E8M0), (128, 256), "not known"),
        ("transformers", ints(3), (7, 64), "torch, decompressed"),
        ("transformers", ints(symmetric=False), (8, 64), f"torch, decompressed, with {DEQUANTIZE}"),
    ],
)  # fmt: skip
def test_kernels_take_what_their_source_says(target, weight, shape, kernel):
    verdict = one(target, weight, shape)
    assert (verdict.kernel, verdict.refused) == (kernel, "")


@pytest.mark.parametrize(
    ("weight", "input", "kernel"),
    [
        (ints(8, -1), TOKEN, "INT8, scaled_mm"),
        (ints(8, 64), TOKEN, "not known"),
        (ints(4, 64), TOKEN, "not known"),
        (Scheme(FloatGrid("e4m3"), PerTensor()), FLOAT_TOKEN, "FP8, scaled_mm"),
        (NVFP4, replace(NVFP4, dynamic=True), "FP4, which kernel is not known"),
        (NVFP4, FLOAT_TOKEN, "not known"),
    ],
)
@pytest.mark.parametrize("target", ENGINES)
def test_what_is_not_known_is_called_so(target, weight, input, kernel):
    verdict = one(target, weight, input=input)
    assert (verdict.kernel, verdict.refused) == (kernel, "")


REFUSED = [
    *(("vllm", ints(bits), "weight.grid", f"not of {bits}: packs of 3, 5, 6 and 7 bits") for bits in (3, 5, 6, 7)),
    *(("sglang", ints(bits), "weight.grid", f"4 and 8 bits, not of {bits}; use 4 or 8") for bits in (2, 3)),
    ("vllm", ints(2, symmetric=False), "weight.grid", "not of 2; use 4 or 8 bits"),
    ("vllm", ints(size=16), "weight.granularity", "groups of 16; use group_size=32, 64 or 128, PerChannel or export"),
    ("sglang", ints(size=256), "weight.granularity", "groups of 256; use group_size=32, 64 or 128, PerChannel"),
    ("sglang", ints(8, symmetric=False), "weight.symmetric", "8 bits with zero points, not 256 x 128"),
    ("vllm", ints(8, 32, symmetric=False), "weight.symmetric", "8 bits with zero points, not 256 x 128"),
    ("vllm", Scheme(IntGrid(4), PerTensor()), "weight.granularity", "by group or channel; use PerGroup"),
]


@pytest.mark.parametrize(("target", "weight", "part", "words"), REFUSED)
def test_a_refusal_names_the_layer_the_value_and_the_fix(target, weight, part, words):
    verdict = one(target, weight)
    assert verdict.part == part
    assert verdict.kernel == ""
    assert verdict.refused.startswith(f"model.layers.0.mlp.down_proj [128, 256] as {weight}: export.target={target} ")
    assert words in verdict.refused
    assert re.search(r"; use ", verdict.refused)


def test_any_group_goes_in_fp16():
    assert one("vllm", ints(size=16), dtype="float16").kernel == "Exllama"
    assert one("vllm", ints(), (576, 576), dtype="float16").kernel == "Marlin or Exllama"
    assert one("vllm", ints(size=-1), (576, 576), dtype="float16").kernel == "Marlin"  # a channel is no group
    assert one("vllm", ints(size=16), (129, 256), dtype="float16").part == "weight.granularity"  # 8 codes fill a word


@pytest.mark.parametrize("target", ENGINES)
def test_words_are_whole(target):
    for weight, shape in ((ints(size=-1), (64, 68)), (ints(size=-1, symmetric=False), (68, 128))):
        verdict = one(target, weight, shape)
        assert verdict.part == "match"
        assert "whole words of 8 in-features" in verdict.refused
    assert one("vllm", ints(size=-1), (68, 128)).kernel == "Marlin"


@pytest.mark.parametrize("bits", [3, 5, 6, 7])
def test_odd_widths_are_packed_with_a_quantized_input_too(bits):
    assert one("vllm", ints(bits), input=TOKEN).part == "weight.grid"


def test_sglang_pads_nothing():
    for shape in ((64, 64), (96, 128)):
        verdict = one("sglang", ints(size=32), shape)
        assert verdict.part == "match"
        assert f"not {shape[1]} x {shape[0]}" in verdict.refused
        assert "weight=null" in verdict.refused
        assert one("vllm", ints(size=32), shape).kernel == "Marlin"


def test_nothing_pads_under_a_g_idx():
    """Machete takes it on one GPU, Exllama in fp16; Marlin where its tiles are full; by channel no group is."""

    def layer(shape, **weight):
        return [Layer("model.layers.0.mlp.down_proj", shape, ints(**weight), g_idx=True)]

    assert verdicts("vllm", CT, layer((128, 256)), "bfloat16")[0].kernel == "Machete (Hopper) or Marlin"
    assert verdicts("vllm", CT, layer((128, 192)), "bfloat16")[0].kernel == "Machete (Hopper)"
    assert verdicts("vllm", CT, layer((96, 192), size=32), "float16")[0].kernel == "Exllama"
    refused = verdicts("vllm", "gptq", layer((576, 576)), "bfloat16")[0]
    assert (refused.part, refused.kernel) == ("match", "")
    assert "not 576 x 576" in refused.refused
    assert "weight=null, or use act_order=group" in refused.refused
    assert verdicts("vllm", CT, layer((576, 576), size=-1), "bfloat16")[0].kernel == "Marlin"


def test_transformers_reads_a_g_idx_in_gptqs_layout_alone():
    layers = [Layer("model.layers.0.mlp.down_proj", (128, 256), ints(), g_idx=True)]
    assert verdicts("transformers", "gptq", layers, "bfloat16")[0].kernel == "GPTQModel"
    (verdict,) = verdicts("transformers", CT, layers, "bfloat16")
    assert "has no g_idx since 0.19; use act_order=group or static, or format=gptq" in verdict.refused


def test_the_library_still_has_no_g_idx():
    """What `export.target=transformers` and the certificate say of it."""
    from compressed_tensors.quantization import QuantizationArgs

    with pytest.raises(ValueError, match="actorder='group' has been removed"):
        QuantizationArgs(num_bits=4, strategy="group", group_size=32, actorder="group")


def test_sizes_are_those_of_what_is_multiplied_as_one():
    """q, k and v of 32 rows each: no kernel of SGLang's takes one, and it takes all, together 128 rows."""
    names = {"q_proj": 64, "k_proj": 32, "v_proj": 32}
    layers = [Layer(f"model.layers.0.self_attn.{name}", (rows, 128), ints()) for name, rows in names.items()]
    assert [v.kernel for v in verdicts("sglang", CT, layers, "bfloat16")] == ["Marlin"] * 3
    assert [v.kernel for v in verdicts("vllm", CT, layers, "bfloat16")] == ["Machete (Hopper) or Marlin"] * 3
    assert one("sglang", ints(), (32, 128), module="q_proj").part == "match"


@pytest.mark.parametrize("other", [ints(8), None])
@pytest.mark.parametrize("target", ENGINES)
def test_what_is_multiplied_as_one_has_one_scheme(target, other):
    layers = [Layer("a.gate_proj", (128, 128), ints()), Layer("a.up_proj", (128, 128), other)]
    first = verdicts(target, CT, layers, "bfloat16")[0]
    assert first.part == "weight"
    assert f"it and a.up_proj, which is {other or 'not quantized'}, as one; give both one scheme" in first.refused
    assert not any(v.refused for v in verdicts("transformers", CT, layers, "bfloat16"))
    apart = [layers[0], replace(layers[1], name="b.up_proj")]
    assert not any(v.refused for v in verdicts(target, CT, apart, "bfloat16"))


@pytest.mark.parametrize("target", ENGINES)
def test_a_quantized_head_is_refused_and_one_that_is_left_alone_is_not(target):
    verdict = one(target, ints(), module="lm_head")
    assert verdict.part == "match"
    assert verdict.refused.startswith("lm_head [128, 256] as int4_g64: ")
    assert "does not load a quantized head; add a later rule for it with weight=null" in verdict.refused
    assert verdicts(target, CT, [Layer("lm_head", (128, 256), None)], "bfloat16") == []


def test_transformers_has_zero_points_of_one_scheme_alone():
    layers = [Layer("a.q_proj", (64, 64), ints(symmetric=False)), Layer("a.o_proj", (64, 64), ints(8))]
    first, second = verdicts("transformers", CT, layers, "bfloat16")
    assert (first.part, second.refused) == ("weight.symmetric", "")
    assert "a.q_proj [64, 64] as int4_g64_asym: export.target=transformers does not load packed zero" in first.refused
    assert "use symmetric=true, or one scheme" in first.refused


def test_transformers_has_gptqs_linears_alike():
    same = [Layer("a.q_proj", (64, 64), ints()), Layer("a.o_proj", (64, 64), ints())]
    assert [v.kernel for v in verdicts("transformers", "gptq", same, "bfloat16")] == ["GPTQModel"] * 2
    for other, words in ((ints(8), "several schemes"), (None, "a.o_proj is left alone")):
        found = verdicts("transformers", "gptq", [same[0], replace(same[1], weight=other)], "bfloat16")
        assert words in found[0].refused
    head = [*same, Layer("lm_head", (64, 64), None)]
    assert not any(v.refused for v in verdicts("transformers", "gptq", head, "bfloat16"))


def test_gptqs_and_awqs_layouts_go_to_marlin():
    assert one("vllm", ints(), name="gptq").kernel == "Marlin"
    assert one("vllm", ints(symmetric=False), name="gptq").part == "weight.symmetric"
    assert one("vllm", ints(2), name="gptq").part == "weight.grid"
    assert one("vllm", ints(symmetric=False), name="awq").kernel == "Marlin"
    assert one("vllm", ints(), name="awq").kernel == "Marlin"
    assert one("vllm", ints(size=16), name="awq", dtype="float16").part == "weight.granularity"


def test_files_as_a_whole():
    assert list(whole("vllm", CT, "bfloat16", None)) == []
    assert list(whole("transformers", CT, "float32", KINDS["int8"])) == []
    found = dict(whole("sglang", "gguf", "float32", KINDS["int8"]))
    assert found["format.name"] == "export.target=sglang does not read format=gguf; use format=compressed_tensors"
    assert "16 bits; use bfloat16 or float16" in found["export.dtype"]
    assert f"not {KINDS['int8']}; use kv=null" in found["recipe.kv"]
    for target in READS:  # nothing is written
        assert [key for key, _ in whole(target, "none", "bfloat16", None)] == ["format.name"]
    assert [key for key, _ in whole("llamacpp", CT, "bfloat16", None)] == ["format.name"]
    assert list(whole("llamacpp", "gguf", "bfloat16", None)) == []
