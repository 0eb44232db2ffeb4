"""Words: every pair of schemes survives them, the library accepts them, and what they cannot say is refused."""

from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors.format import infer_module_format
from compressed_tensors.quantization import QuantizationScheme
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from tiny_grids import OTHERS, PAIRS

from qat.formats.ct_args import FLOAT, INT, PACKED, args, config_groups, kv_args, kv_scheme, refused, schemes_of
from qat.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from qat.numerics.grid import Codebook, FloatGrid, IntGrid
from qat.numerics.kv import KINDS
from qat.numerics.scheme import Scheme

W8, W4 = Scheme(IntGrid(8), PerChannel()), Scheme(IntGrid(4), PerGroup(32))
A8 = Scheme(IntGrid(8), PerToken(), dynamic=True)
FP8, NVFP4, MXFP4 = Scheme(FloatGrid("e4m3"), PerChannel()), OTHERS["nvfp4"], OTHERS["mxfp4"]
PRESETS = {  # of the library, and what we call the same
    "w8a8_ct": "W8A8", "fp8_tensor": "FP8", "fp8": "FP8_DYNAMIC", "nvfp4": "NVFP4", "nvfp4a16": "NVFP4A16",
    "mxfp4": "MXFP4", "mxfp4a16": "MXFP4A16", "mxfp8": "MXFP8", "mxfp8a16": "MXFP8A16",
}  # fmt: skip


def group(weight, input=None):
    return config_groups({(weight, input): ["w"]})


@pytest.mark.parametrize("name", PAIRS)
def test_every_pair_survives_its_words_and_the_library_takes_them(name):
    weight, input = PAIRS[name]
    written = group(weight, input)
    found = schemes_of("here", "group_0", written)
    stored = replace(input, scale_dtype=None) if input and not input.dynamic else input  # the file's tensor tells
    assert found == (written["format"], weight, stored)
    scheme = QuantizationScheme(**written["config_groups"]["group_0"])
    inferred = infer_module_format(torch.nn.Linear, scheme).value
    assert inferred == (INT if name in ("w4a8", "w4a8_fp8") else written["format"])  # it would spend a byte a code


@pytest.mark.parametrize("name", PRESETS)
def test_words_are_those_of_the_librarys_presets(name):
    scheme = QuantizationScheme(**group(*PAIRS[name])["config_groups"]["group_0"])
    preset = preset_name_to_scheme(PRESETS[name], ["Linear"])
    for part in ("weights", "input_activations"):
        ours, theirs = getattr(scheme, part), getattr(preset, part)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            silent = {"observer", "zp_dtype"}  # how it was calibrated; of symmetric schemes, nothing
            assert ours.model_dump(exclude=silent) == theirs.model_dump(exclude=silent)


def test_a_dtype_of_dynamic_scales_is_said():
    narrow = replace(A8, scale_dtype="bfloat16")
    assert args(narrow)["scale_dtype"] == "torch.bfloat16"
    assert schemes_of("", "group_0", group(W8, narrow)) == (INT, W8, narrow)


def test_several_pairs_name_their_modules():
    found = config_groups({(W4, None): ["a", "b"], (W8, A8): ["c"], (W8, replace(A8, convention="vllm")): ["d"]})
    assert [g["targets"] for g in found["config_groups"].values()] == [["a", "b"], ["c"], ["d"]]
    assert [g["format"] for g in found["config_groups"].values()] == [PACKED, INT, INT]
    assert found["format"] == "mixed-precision"
    assert found["scale_conventions"] == {"group_2": {"input_activations": "vllm"}}


@pytest.mark.parametrize(
    ("weight", "input", "part", "words"),
    [
        (Scheme(Codebook("nf4"), PerGroup(32)), None, "weight.grid", "not the weight scheme nf4_g32; use format=none"),
        (Scheme(FloatGrid("e2m1"), PerGroup(32)), None, "weight.grid", "not the weight scheme e2m1_g32"),
        (replace(NVFP4, granularity=PerGroup(32)), None, "weight.grid", "NVFP4 (e2m1, groups of 16"),
        (replace(MXFP4, granularity=PerGroup(16)), None, "weight.grid", "not the weight scheme e2m1_g16_e8m0"),
        (replace(NVFP4, grid=FloatGrid("e4m3")), None, "weight.grid", "not the weight scheme e4m3_g16_e4m3"),
        (Scheme(IntGrid(4), PerTensor(), symmetric=False), None, "weight.symmetric", "use symmetric=true"),
        (Scheme(IntGrid(4), PerTensor(), symmetric=False), A8, "weight.symmetric", "use symmetric=true"),
        (W8, Scheme(IntGrid(8), PerTensor(), dynamic=True), "input", "use granularity=PerToken or dynamic=false"),
        (W8, Scheme(Codebook("ternary"), PerToken(), dynamic=True), "input", "not the input scheme ternary_token"),
        (W8, Scheme(IntGrid(8), PerChannel()), "input", "carries inputs with one calibrated range"),
        (W8, Scheme(IntGrid(8), PerGroup(32)), "input", "carries inputs with one calibrated range"),
    ],
)
def test_what_the_words_cannot_say_is_refused(weight, input, part, words):
    ((found, text),) = refused(weight, input)
    assert found == part
    assert words in text


def test_what_they_can_say_is_not():
    assert not [text for pair in PAIRS.values() for text in refused(*pair)]
    assert not list(refused(Scheme(IntGrid(8), PerTensor(), symmetric=False), A8))  # in bytes, its zero point is one
    assert not list(refused(Scheme(Codebook("seq2"), PerGroup(32)), A8))  # as integers


def changed(weight, input=None, **changes):
    written = group(weight, input)
    said = written["config_groups"]["group_0"]
    for key, value in changes.items():
        (said if key in said else said["weights"] if input is None else said["input_activations"])[key] = value
    return written


@pytest.mark.parametrize(
    ("written", "words"),
    [
        (changed(W8, num_bits="8"), "here: weights: num_bits '8'"),
        (changed(W8, type="complex"), "here: weights: type 'complex' of bits=8"),
        (changed(FP8, num_bits=6), "here: weights: type 'float' of bits=6"),
        (changed(W8, symmetric="false"), "symmetric 'false'; expected true or false"),
        (changed(W8, strategy="block"), "strategy 'block'"),
        (changed(W4, group_size=None), "group_size None"),
        (changed(W8, dynamic=True), "format 'pack-quantized' with weights int8_channel_dynamic"),
        (changed(W8, format="float-quantized"), "format 'float-quantized' with weights int8_channel"),
        (changed(FP8, format="mxfp8-quantized"), "format 'mxfp8-quantized' with weights e4m3_channel"),
        (changed(NVFP4, format="mxfp4-pack-quantized"), "format 'mxfp4-pack-quantized' with weights e2m1_g16_e4m3"),
        (changed(NVFP4, group_size=32), "weight.grid: this reader carries integers, e4m3, NVFP4"),
        (changed(W8, output_activations={"num_bits": 8}), "here: output_activations are set"),
        (changed(W8, A8, dynamic="local"), "here: input_activations: dynamic 'local' with strategy 'token'"),
        (changed(W8, A8, strategy="tensor"), "here: input: this reader carries no input scheme that makes a token"),
        (changed(W8, A8, scale_dtype="torch.int8"), "scale_dtype 'torch.int8'"),
        (changed(W8, A8, dynamic=False), "granularity=PerToken needs dynamic=true"),
        (changed(W8, weights=[8]), "here: weights: expected an object, found [8]"),
        (changed(W8, format=[1]), "here: format [1] with weights int8_channel"),
        (group(W8, A8) | {"scale_conventions": ["vllm"]}, "here: expected objects"),
        (group(W8, A8) | {"config_groups": {"group_0": "W8A8"}}, "here: expected objects, found 'W8A8'"),
        (group(W8, A8) | {"scale_conventions": {"group_0": {"weights": "other"}}}, "convention='other'"),
        (
            group(W8, Scheme(IntGrid(8), PerTensor()))
            | {"scale_conventions": {"group_0": {"input_activations": "signed"}}},
            "here: scale_conventions says signed of input_activations",
        ),
    ],
)
def test_words_that_are_not_served_are_named(written, words):
    with pytest.raises(ValueError, match=r"^here") as caught:
        schemes_of("here", "group_0", written)
    assert words in str(caught.value)


def test_words_of_other_writers():
    """No format in the group, no scale dtype in FP4's groups, a group size of -1, a missing symmetric."""
    written = group(FP8, Scheme(FloatGrid("e4m3"), PerToken(), dynamic=True))
    said = written["config_groups"]["group_0"]
    said["format"], said["weights"]["group_size"] = None, -1
    del said["weights"]["symmetric"]
    assert schemes_of("", "group_0", written)[:2] == (FLOAT, FP8)
    for scheme in (NVFP4, MXFP4):
        written = group(scheme)
        del written["config_groups"]["group_0"]["weights"]["scale_dtype"]
        assert schemes_of("", "group_0", written)[1] == scheme


@pytest.mark.parametrize("kind", KINDS)
def test_a_caches_scheme_survives_its_words(kind):
    assert kv_scheme(kv_args(KINDS[kind], 64), 64) == KINDS[kind]
    with pytest.raises(ValueError, match="this reader serves dynamic int8, int4, fp8"):
        kv_scheme(kv_args(KINDS[kind], 64), 32)
