"""NVFP4 and MX: training's rounding, scales included, is the reference's, bit for bit."""

import pytest
import torch
import torch.nn.functional as F
from tiny_grids import DTYPES, OTHERS, bits, extremes, thousand_seeds

from qat.kernels.fake_quant import fake_quantize
from qat.kernels.fp4 import linear, mx, nvfp4, round_e2m1
from qat.numerics.affine import divisor, rtn
from qat.numerics.grid import FloatGrid
from qat.numerics.levels import snap
from qat.numerics.qtensor import QuantizedTensor

REFERENCES = {
    "nvfp4": lambda x: nvfp4(x, divisor((x,), OTHERS["nvfp4"])),
    "mxfp4": lambda x: mx(x, 2),
    "mxfp8": lambda x: mx(x, 8),
}


def test_the_rounding_is_the_grids_on_every_bfloat16():
    x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.bfloat16).float()
    x = x[torch.isfinite(x)]
    assert torch.equal(bits(round_e2m1(x)), bits(snap(x, FloatGrid("e2m1"))))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", REFERENCES)
def test_weights_and_activations_are_the_references_over_a_thousand_seeds(name, dtype):
    """One tensor for each size: a divisor is shared by a whole tensor."""
    scheme = OTHERS[name]
    for x in thousand_seeds(8, 64).to(dtype).view(-1, 200, 64):
        g = divisor((x,), scheme)
        codes, scale, _ = rtn(x, scheme, torch.bfloat16, g)
        found, served = fake_quantize(x, scale, scheme.grid, dtype, global_scale=g)
        levels, expected = REFERENCES[name](x)
        assert torch.equal(served.reshape(-1), expected.reshape(-1))
        wanted = (levels.view(*expected.shape, -1) * expected.unsqueeze(-1)).to(dtype).view(x.shape)
        assert torch.equal(bits(found), bits(wanted))
        packed = QuantizedTensor(codes, scale, None, scheme, (200, 64), g)
        assert torch.equal(bits(packed.dequantize(dtype)), bits(wanted))


@pytest.mark.parametrize("name", ["mxfp4", "mxfp8"])
def test_so_are_the_least_and_the_largest(name):
    x, scheme = extremes(), OTHERS[name]
    x = x[x.abs().amax(1) < 1.75 * 2.0**127]  # from there on they count as 2**128, which fp32 lacks
    codes, scale, _ = rtn(x, scheme, torch.bfloat16)
    levels, expected = REFERENCES[name](x)
    assert torch.equal(scale.float(), expected)
    found = QuantizedTensor(codes, scale, None, scheme, tuple(x.shape)).dequantize(torch.float32)
    assert bool(torch.isfinite(found).all())
    assert torch.equal(bits(found), bits(levels * expected))


@pytest.mark.parametrize("name", REFERENCES)
def test_the_linear_multiplies_the_dequantized_operands(name):
    scheme, w, x = OTHERS[name], torch.randn(24, 64), torch.randn(5, 64)
    g = divisor((w,), scheme)
    packed = QuantizedTensor(*rtn(w, scheme, torch.bfloat16, g), scheme, (24, 64), g)
    levels, scale = REFERENCES[name](x)
    rounded = (levels.view(*scale.shape, -1) * scale.unsqueeze(-1)).view(x.shape)
    expected = F.linear(rounded.double(), packed.dequantize(torch.float32).double())
    found = linear(x, packed, input=(levels, scale))
    assert float((found.double() - expected).abs().max()) <= 2e-6 * float(expected.abs().max())
    assert torch.equal(linear(x, packed), F.linear(x, packed.dequantize(torch.float32)))
