"""FP8: rounding by arithmetic equals the cast that training uses, and so do the products."""

import pytest
import torch
import torch.nn.functional as F
from tiny_grids import DTYPES, bits, extremes, thousand_seeds

from qat.kernels.fp8 import linear, quantize_tokens, round_e4m3
from qat.nn.estimators import Clipped
from qat.nn.fake_quantize import FakeQuantize
from qat.nn.observers.minmax import MinMax
from qat.numerics.affine import rtn
from qat.numerics.granularity import PerChannel, PerTensor, PerToken
from qat.numerics.grid import FloatGrid
from qat.numerics.levels import snap
from qat.numerics.qtensor import QuantizedTensor
from qat.numerics.scheme import Scheme

E4M3 = FloatGrid("e4m3")


def test_the_rounding_is_the_grids_on_every_bfloat16():
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).float()
    x = x[torch.isfinite(x)]
    assert torch.equal(bits(round_e4m3(x)), bits(snap(x, E4M3)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("static", [False, True])
def test_activations_are_the_references_over_a_thousand_seeds(static, dtype):
    x = thousand_seeds().to(dtype)
    scheme = Scheme(E4M3, PerTensor() if static else PerToken(), dynamic=not static)
    quant = FakeQuantize(scheme, (1,) if static else None, MinMax(), Clipped(), torch.float32, "x", running=True)
    found = quant(x, dtype)
    levels, scale = quantize_tokens(x, quant.scale if static else None)
    assert torch.equal(bits(found), bits((levels * scale[:, None]).to(dtype)))


def test_so_are_the_least_and_the_largest():
    x = extremes()
    quant = FakeQuantize(
        Scheme(E4M3, PerToken(), dynamic=True), None, MinMax(), Clipped(), torch.float32, "x", running=True
    )
    levels, scale = quantize_tokens(x)
    assert torch.equal(bits(quant(x, torch.float32)), bits(levels * scale[:, None]))


@pytest.mark.parametrize("granularity", [PerChannel(), PerTensor()], ids=str)
def test_the_linear_is_that_of_the_dequantized_operands(granularity):
    scheme, w, x = Scheme(E4M3, granularity), torch.randn(24, 64), torch.randn(2, 5, 64)
    packed = QuantizedTensor(*rtn(w, scheme, torch.bfloat16), scheme, (24, 64))
    levels, scale = quantize_tokens(x)
    exact = F.linear(
        (levels.double() * scale.double()[:, None]).view(2, 5, 64), packed.dequantize(torch.float32).double()
    )
    found = linear(x, packed, torch.ones(24))
    assert float((found.double() - 1 - exact).abs().max()) <= 2e-6 * float(exact.abs().max())
