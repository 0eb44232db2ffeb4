"""Training's W8A8 and W4A8 against the integer reference: the same codes, bit for bit, and the same products."""

import pytest
import torch
import torch.nn.functional as F
from tiny_grids import DTYPES, bits, extremes, thousand_seeds

from qat.kernels.w8a8 import linear, quantize_tokens
from qat.nn.estimators import LSQ, Clipped
from qat.nn.fake_quantize import FakeQuantize, Phase
from qat.nn.linear import QATLinear
from qat.nn.observers.minmax import MinMax
from qat.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from qat.numerics.grid import IntGrid
from qat.numerics.qtensor import QuantizedTensor
from qat.numerics.scheme import Scheme

REACH = {"ct": 127.5, "vllm": 127.0}


def token(convention="ct"):
    return Scheme(IntGrid(8), PerToken(), dynamic=True, convention=convention)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("convention", REACH)
def test_activations_are_the_references_over_a_thousand_seeds(convention, dtype):
    x = thousand_seeds().to(dtype)
    quant = FakeQuantize(token(convention), None, MinMax(), Clipped(), torch.bfloat16, "x", running=True)
    codes, scale = quantize_tokens(x, REACH[convention])
    assert torch.equal(bits(quant(x, dtype)), bits((codes.float() * scale[:, None]).to(dtype)))


@pytest.mark.parametrize("convention", REACH)
def test_so_are_the_least_and_the_largest(convention):
    x = extremes()
    quant = FakeQuantize(token(convention), None, MinMax(), Clipped(), torch.bfloat16, "x", running=True)
    codes, scale = quantize_tokens(x, REACH[convention])
    assert torch.equal(bits(quant(x, torch.float32)), bits(codes.float() * scale[:, None]))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("width", [4, 8])
@pytest.mark.parametrize("granularity", [PerChannel(), PerGroup(16), PerTensor()], ids=str)
def test_the_linear_that_training_computes_is_the_integer_one(granularity, width, symmetric):
    scheme = Scheme(IntGrid(width), granularity, symmetric)
    plain = torch.nn.Linear(64, 24).requires_grad_(False)
    weight = FakeQuantize(scheme, (24, 64), MinMax(), LSQ(), torch.bfloat16, "w")
    weight.observe(plain.weight)
    weight.phase = Phase.LEARN
    inputs = FakeQuantize(token(), None, MinMax(), Clipped(), torch.bfloat16, "x", running=True)
    trained = QATLinear.from_float(plain, weight, inputs)
    packed = QuantizedTensor(weight.codes(plain.weight), *weight.qparams(), scheme, (24, 64))
    x = torch.randn(3, 5, 64)
    found = linear(x, packed, plain.bias)
    codes, scale = quantize_tokens(x)
    exact = F.linear(codes.double() * scale.double()[:, None], packed.dequantize(torch.float32).double())
    exact = exact.view(3, 5, 24) + plain.bias.double()
    assert float((found.double() - exact).abs().max()) <= 2e-6 * float(exact.abs().max())
    assert float((trained(x).detach().double() - exact).abs().max()) <= 2e-6 * float(exact.abs().max())
