import pytest
import torch
from tiny import scheme

from qat.numerics.affine import rtn
from qat.numerics.granularity import PerChannel, PerGroup, PerTensor
from qat.numerics.grid import IntGrid
from qat.numerics.qtensor import QuantizedTensor, regrouped
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
    s = Scheme(IntGrid(4), granularity, symmetric)
    codes, scale, zero = rtn(torch.randn(6, 128), s, torch.bfloat16)
    tensor = QuantizedTensor(codes, scale, zero, s, (6, 128))
    found = regrouped(tensor, PerGroup(32))
    assert found.scheme == Scheme(IntGrid(4), PerGroup(32), symmetric)
    assert found.scale.shape == (6, 4)
    assert torch.equal(found.dequantize(torch.float32), tensor.dequantize(torch.float32))
    with pytest.raises(ValueError, match="groups of 128 do not divide those of"):
        regrouped(found, PerGroup(128))
