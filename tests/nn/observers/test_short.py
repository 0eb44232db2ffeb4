import pytest
import torch
from tiny import scheme

from qat.formats import gguf
from qat.nn.observers.minmax import MinMax
from qat.nn.observers.short import Short
from qat.numerics.affine import quantize
from qat.numerics.granularity import PerGroup
from qat.numerics.grid import FloatGrid
from qat.numerics.qtensor import QuantizedTensor
from qat.numerics.scheme import Scheme

A4 = scheme(4, 32, symmetric=False)
BF16 = torch.bfloat16


@pytest.mark.parametrize("digits", [1, 4, 7])
@pytest.mark.parametrize("symmetric", [True, False])
def test_a_scale_has_no_more_digits_and_is_the_nearest_such(digits, symmetric):
    x, own = torch.randn(64, 256), scheme(4, 32, symmetric=symmetric)
    scale, zero = Short(MinMax(), digits).qparams(x, own, torch.float32)
    mantissa = torch.frexp(scale.double())[0] * 2.0**digits
    assert torch.allclose(mantissa, mantissa.round(), rtol=0, atol=2.0 ** (digits - 20)), "but for a last bit of fp32"
    stored, stored_zero = Short(MinMax(), digits).qparams(x, own, BF16)
    exact = torch.frexp(stored.double())[0] * 2.0**digits
    assert torch.equal(exact, exact.round()), "in the storage dtype, exactly"
    full, full_zero = MinMax().qparams(x, own, torch.float32)
    assert float((scale / full - 1).abs().max()) <= 2.0**-digits * 1.001
    if not symmetric:
        assert torch.equal(zero, full_zero)
        assert int((stored_zero - full_zero).abs().max()) <= 1, "of the rounded scale"


def test_q4_1_holds_every_product_with_a_zero_point():
    x = torch.randn(64, 256) + torch.randn(64, 1)
    for observer, holds in ((MinMax(), False), (Short(MinMax()), True)):
        scale, zero = observer.qparams(x, A4, BF16)
        tensor = QuantizedTensor(quantize(x, scale, zero, A4.grid), scale, zero, A4, (64, 256))
        if holds:
            gguf.pack_tensor("q", tensor)
        else:
            with pytest.raises(ValueError, match="observer=short"):
                gguf.pack_tensor("q", tensor)


def test_empty_groups_and_scales_of_other_dtypes_stay():
    lo, hi = Short(MinMax()).observe(torch.zeros(2, 64), A4, BF16)
    assert not lo.any()
    assert not hi.any()
    x, mx = torch.randn(4, 64), Scheme(FloatGrid("e4m3"), PerGroup(32), scale_dtype="float8_e8m0fnu")
    ours, theirs = Short(MinMax()).observe(x, mx, BF16), MinMax().observe(x, mx, BF16)
    assert all(map(torch.equal, ours, theirs))


def test_no_digits_are_an_error():
    with pytest.raises(ValueError, match="digits=0"):
        Short(MinMax(), 0)
