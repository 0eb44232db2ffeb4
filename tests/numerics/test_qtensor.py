import pytest
import torch
from tiny import scattered, scheme

from qat.numerics.affine import rtn
from qat.numerics.granularity import PerChannel, PerGroup, PerTensor
from qat.numerics.grid import FloatGrid, IntGrid
from qat.numerics.qtensor import QuantizedTensor, as_g_idx, consecutive, regrouped
from qat.numerics.scheme import Scheme


def make(symmetric=True):
    s = scheme(4, 32, symmetric)
    codes, scale, zero = rtn(torch.randn(8, 64), s, torch.bfloat16)
    return QuantizedTensor(codes, scale, zero, s, (8, 64))


@pytest.mark.parametrize("symmetric", [True, False])
def test_bits_count_codes_scales_and_zeros(symmetric):
    assert make(symmetric).bits == 8 * 64 * 4 + 16 * 16 + (0 if symmetric else 16 * 4)


def test_dequantize_rounds_once_to_the_named_dtype():
    tensor = make()
    exact = tensor.dequantize(torch.float32)
    assert torch.equal(tensor.dequantize(torch.bfloat16), exact.bfloat16())


def test_to_keeps_every_part():
    moved = make(False).to("meta")
    assert (moved.codes.device.type, moved.scale.device.type, moved.zero_point.device.type) == ("meta",) * 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"codes": torch.zeros(8, 64)}, "codes torch.float32"),
        ({"codes": torch.zeros(8, 63, dtype=torch.int8)}, "expected int8"),
        ({"scale": torch.ones(8, 3)}, "scale of shape"),
        ({"zero_point": torch.zeros(8, 2, dtype=torch.int8)}, "symmetric=True but zero_point is Tensor"),
        (
            {"g_idx": torch.arange(64) // 32},
            r"g_idx torch.int64 \(64,\): expected int32 \[64\], each of 2 groups as often",
        ),
        ({"g_idx": consecutive(32, 2)}, r"g_idx torch.int32 \(32,\)"),
        ({"g_idx": torch.zeros(64, dtype=torch.int32)}, "each of 2 groups as often"),
        ({"g_idx": consecutive(64, 2) - 1}, "each of 2 groups as often"),
    ],
)
def test_parts_that_do_not_fit_are_refused(change, message):
    tensor = make()
    parts = {k: getattr(tensor, k) for k in ("codes", "scale", "zero_point", "scheme", "shape")}
    with pytest.raises(ValueError, match=message):
        QuantizedTensor(**parts | change)


@pytest.mark.parametrize("granularity", [PerGroup(64), PerGroup(32), PerChannel(), PerTensor()], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_smaller_groups_have_the_same_values(granularity, symmetric):
    s = Scheme(IntGrid(4), granularity, symmetric, convention="signed")
    codes, scale, zero = rtn(torch.randn(6, 128), s, torch.bfloat16)
    tensor = QuantizedTensor(codes, scale, zero, s, (6, 128))
    found = regrouped(tensor, PerGroup(32))
    assert found.scheme == Scheme(IntGrid(4), PerGroup(32), symmetric, convention="signed")
    assert found.scale.shape == (6, 4)
    assert torch.equal(found.dequantize(torch.float32), tensor.dequantize(torch.float32))
    with pytest.raises(ValueError, match="groups of 128 do not divide those of"):
        regrouped(found, PerGroup(128))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    ("bits", "size", "shape"), [(4, 32, (8, 64)), (3, 16, (5, 80)), (2, 8, (1, 8)), (8, 1, (3, 7))]
)
def test_a_g_idx_says_whose_scale_each_in_feature_has(bits, size, shape, symmetric):
    """Element by element: W[o, i] = (q[o, i] - z[o, g_idx[i]]) * s[o, g_idx[i]], rounded once."""
    s = Scheme(IntGrid(bits), PerGroup(size), symmetric, convention="signed")
    tensor = scattered(QuantizedTensor(*rtn(torch.randn(shape), s, torch.bfloat16), s, shape), seed=bits)
    zero = torch.zeros_like(tensor.scale) if symmetric else tensor.zero_point
    places = tensor.g_idx.long()
    exact = (tensor.codes.float() - zero[:, places].float()) * tensor.scale[:, places].float()
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(tensor.dequantize(dtype), exact.to(dtype))
    ordered = tensor.in_order()
    assert ordered.g_idx is None
    assert torch.equal(ordered.dequantize(torch.float32), exact[:, tensor.order])
    assert torch.equal(tensor.g_idx[tensor.order], consecutive(shape[1], shape[1] // size))
    assert tensor.bits == ordered.bits + 32 * shape[1]


def test_consecutive_groups_have_no_g_idx():
    assert as_g_idx(torch.arange(64) // 32, 2) is None
    assert as_g_idx((torch.arange(64) // 32).flip(0), 2).dtype == torch.int32
    assert make().order is None
    assert make().in_order().g_idx is None


def test_what_multiplies_levels_has_the_sign_of_the_scale_and_is_over_the_divisor():
    tensor = make()
    assert bool((tensor.served < 0).any())
    assert torch.equal(tensor.served, tensor.scale.float())
    s = Scheme(FloatGrid("e2m1"), PerGroup(16), scale_dtype="float8_e4m3fn")
    x, g = torch.randn(8, 64), torch.tensor([300.0])
    two = QuantizedTensor(*rtn(x, s, torch.bfloat16, g), s, (8, 64), g)
    assert torch.equal(two.served, two.scale.float() / g)
