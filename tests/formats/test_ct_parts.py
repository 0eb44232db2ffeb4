"""The bytes of every sub-format: golden, the library's own, and read back only where they can be right."""

from dataclasses import replace

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.compressors.mx_utils import compress_mx_scale
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8
from compressed_tensors.compressors.pack_quantized import pack_to_int32
from compressed_tensors.quantization import QuantizationScheme
from tiny_grids import OTHERS, PAIRS

from qat.formats.ct_args import PACKED, config_groups, sub_format
from qat.formats.ct_parts import check_input, pack_tensor, part_names, unpack_tensor
from qat.numerics.affine import divisor, rtn
from qat.numerics.granularity import PerChannel, PerGroup, PerTensor
from qat.numerics.grid import FloatGrid, IntGrid
from qat.numerics.qtensor import QuantizedTensor
from qat.numerics.scheme import Scheme

E2M1 = FloatGrid("e2m1")
NVFP4, MXFP4 = OTHERS["nvfp4"], OTHERS["mxfp4"]
SIXTEEN = torch.arange(16, dtype=torch.uint8)[None]  # every bit pattern of e2m1


def random(scheme, shape=(24, 64)):
    x = torch.randn(shape)
    g = divisor((x,), scheme)
    codes, scale, zero = rtn(x, scheme, torch.bfloat16, g)
    if scheme.grid == E2M1:
        codes[codes == 8] = 0  # the library forgets the sign of a zero when it quantizes
    return QuantizedTensor(codes, scale, zero, scheme, shape, g)


@pytest.mark.parametrize("bits", range(2, 9))
def test_words_are_those_of_the_library(bits):
    s = Scheme(IntGrid(bits), PerChannel(), symmetric=False)
    tensor = random(s, (24, 72))
    parts = pack_tensor(tensor)
    assert torch.equal(parts["weight_packed"], pack_to_int32(tensor.codes, bits))
    assert torch.equal(parts["weight_zero_point"], pack_to_int32(tensor.zero_point, bits, packed_dim=0))
    assert parts["weight_shape"].tolist() == [24, 72]


def test_golden_bytes():
    codes = torch.tensor([[-8, -7, -6, -5, -4, -3, 6, 7]], dtype=torch.int8)
    tensor = QuantizedTensor(
        codes, torch.ones(1, 1, dtype=torch.bfloat16), None, Scheme(IntGrid(4), PerChannel()), (1, 8)
    )
    assert pack_tensor(tensor)["weight_packed"].item() & 0xFFFFFFFF == 0xFE543210
    assert "weight_zero_point" not in pack_tensor(tensor)
    assert pack_tensor(tensor, packed=False)["weight"].tolist() == codes.tolist()


def test_golden_bytes_of_a_g_idx():
    """The group of in-feature i at place i; one that was never set is the library's -1."""
    tensor = random(Scheme(IntGrid(4), PerGroup(2)), (1, 4))
    scattered = replace(tensor, g_idx=torch.tensor([1, 0, 1, 0], dtype=torch.int32))
    parts = pack_tensor(scattered, reordered=True)
    assert parts["weight_g_idx"].numpy().tobytes() == bytes([1, 0, 0, 0, 0, 0, 0, 0] * 2)
    assert torch.equal(unpack_tensor("m", parts, tensor.scheme).g_idx, scattered.g_idx)
    assert pack_tensor(tensor, reordered=True)["weight_g_idx"].tolist() == [0, 0, 1, 1]
    for places in ([0, 0, 1, 1], [-1] * 4):
        parts["weight_g_idx"] = torch.tensor(places, dtype=torch.int32)
        assert unpack_tensor("m", parts, tensor.scheme).g_idx is None
    uneven = "each of 2 groups as often"
    wrong = ((torch.tensor([1, 0, 1, 1]).int(), uneven), (torch.tensor([-1, 0, 1, 1]).int(), uneven))
    for places, message in (*wrong, (torch.ones(4), "int32")):
        with pytest.raises(ValueError, match=rf"^m\.weight_g_idx.*{message}"):
            unpack_tensor("m", parts | {"weight_g_idx": places}, tensor.scheme)
    with pytest.raises(AssertionError, match="nothing would say"):
        pack_tensor(scattered)


def test_golden_bytes_of_nvfp4():
    """The even column is the low half; a scale is its e4m3 bit pattern, the divisor an fp32."""
    scale = torch.tensor([[1.5]]).to(torch.float8_e4m3fn)
    parts = pack_tensor(QuantizedTensor(SIXTEEN, scale, None, NVFP4, (1, 16), torch.tensor([2688.0])))
    assert parts["weight_packed"].tolist() == [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]]
    assert parts["weight_scale"].view(torch.uint8).tolist() == [[0b0_0111_100]]
    assert parts["weight_global_scale"].view(torch.int32).tolist() == [0x45280000]
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    expected = torch.cat([values, -values]) * (1.5 / 2688.0)
    assert torch.equal(unpack_tensor("w", parts, NVFP4).dequantize(torch.float32)[0], expected)


def test_golden_bytes_of_powers_of_two_and_of_fp8():
    codes = SIXTEEN.repeat(1, 2)
    scale = torch.tensor([[2.0**-5]]).to(torch.float8_e8m0fnu)
    parts = pack_tensor(QuantizedTensor(codes, scale, None, MXFP4, (1, 32)))
    assert parts["weight_scale"].tolist() == [[122]]
    assert parts["weight_packed"].tolist() == [[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2]
    fp8 = Scheme(FloatGrid("e4m3"), PerTensor())
    codes = torch.tensor([[0x00, 0x01, 0x38, 0x7E, 0x80, 0xFE]], dtype=torch.uint8)
    tensor = QuantizedTensor(codes, torch.tensor([0.5]).bfloat16(), None, fp8, (1, 6))
    parts = pack_tensor(tensor)
    assert parts["weight"].dtype == torch.float8_e4m3fn
    assert parts["weight"].float().tolist() == [[0, 2.0**-9, 1, 448, -0.0, -448]]
    assert parts["weight_scale"].view(torch.int16).tolist() == [0x3F00]


@pytest.mark.parametrize("name", PAIRS)
def test_parts_are_named_and_typed_as_the_library_compresses(name):
    """The library makes the same tensors of our values: names, dtypes, and the bits of codes and scales."""
    weight, input = PAIRS[name]
    tensor, packed = random(weight), sub_format(weight, input) == PACKED
    (group,) = config_groups({(weight, input): ["w"]})["config_groups"].values()
    state = {"weight": tensor.dequantize(torch.float32), "weight_scale": tensor.scale}
    if weight.scale_dtype is not None:
        state["weight_scale"] = tensor.scale.float()
    optional = {"weight_zero_point": tensor.zero_point, "weight_global_scale": tensor.global_scale}
    state |= {part: value for part, value in optional.items() if value is not None}
    theirs = BaseCompressor.get_value_from_registry(group["format"]).compress(state, QuantizationScheme(**group))
    ours = pack_tensor(tensor, packed)
    assert set(ours) == set(theirs) == set(part_names(weight, packed))
    for part, value in ours.items():
        assert value.dtype == theirs[part].dtype
        assert torch.equal(value.view(torch.uint8), theirs[part].contiguous().view(torch.uint8)), part


def test_fp4_and_powers_of_two_are_packed_as_by_the_library():
    tensor = random(MXFP4)
    levels = tensor.dequantize(torch.float32).unflatten(-1, (-1, 32)) / tensor.scale.float().unsqueeze(-1)
    parts = pack_tensor(tensor)
    assert torch.equal(parts["weight_packed"], pack_fp4_to_uint8(levels.flatten(-2)))
    assert torch.equal(parts["weight_scale"], compress_mx_scale(tensor.scale.float(), torch.uint8))


def test_small_integers_in_bytes_are_read_if_they_fit():
    """As llm-compressor writes W4A8: `int-quantized` with 4 bits."""
    s = Scheme(IntGrid(4), PerGroup(32))
    parts = pack_tensor(random(s), packed=False)
    assert unpack_tensor("w", parts, s, packed=False).codes.tolist() == parts["weight"].tolist()
    parts["weight"][3, 5] = 8
    with pytest.raises(ValueError, match=r"w\.weight: codes -8 to 8 do not fit int4"):
        unpack_tensor("w", parts, s, packed=False)


@pytest.mark.parametrize(
    ("scheme", "part", "change", "message"),
    [
        (NVFP4, "weight_global_scale", lambda t: t * 0, r"w\.weight_global_scale: a scale is zero"),
        (NVFP4, "weight_global_scale", lambda t: t / 0, r"w\.weight_global_scale: .* not finite"),
        (NVFP4, "weight_global_scale", lambda t: t.half(), r"w\.weight_global_scale: torch\.float16"),
        (NVFP4, "weight_scale", lambda t: t.float(), r"w\.weight_scale: torch\.float32"),
        (NVFP4, "weight_scale", lambda t: torch.zeros_like(t), r"w\.weight_scale: a scale is zero"),
        (NVFP4, "weight_packed", lambda t: t[:, :-1], r"w\.weight_scale: group_size=16 does not divide 62"),
        (NVFP4, "weight_packed", lambda t: t.int(), r"w: weights in torch\.int32"),
        (MXFP4, "weight_scale", lambda t: t.fill_(255), r"w\.weight_scale: .* not finite"),
        (MXFP4, "weight_scale", lambda t: t[:-1], r"w\.weight_scale: torch\.uint8 \(23, 2\), expected .* \(24, 2\)"),
        (OTHERS["fp8_channel"], "weight_scale", lambda t: -t, r"w\.weight_scale: a scale is zero, negative or not"),
        (OTHERS["mxfp8"], "weight", lambda t: t.view(torch.uint8), r"w: weights in torch\.uint8"),
    ],
)
def test_parts_that_cannot_be_right_are_named(scheme, part, change, message):
    parts = pack_tensor(random(scheme))
    with pytest.raises(ValueError, match=message):
        unpack_tensor("w", parts | {part: change(parts[part])}, scheme)


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        ("input_zero_point", torch.zeros(1), "torch.float32"),
        ("input_global_scale", torch.ones(1).half(), "torch.float16"),
        ("input_global_scale", torch.zeros(1), "a scale is zero"),
        ("input_scale", torch.ones(()), "expected"),
        ("input_scale", -torch.ones(1), "negative"),
    ],
)
def test_scales_of_inputs_that_cannot_be_right_are_named(part, value, message):
    scheme = Scheme(IntGrid(8), PerTensor(), symmetric=False)
    good = {"input_scale": torch.ones(1), "input_zero_point": torch.zeros(1, dtype=torch.int8)}
    for name, right in (good | {"input_global_scale": torch.ones(1)}).items():
        check_input(f"w.{name}", right, scheme)
    with pytest.raises(ValueError, match=rf"^w\.{part}: .*{message}"):
        check_input(f"w.{part}", value, scheme)
