"""A served linear's input is training's, bit for bit."""

from dataclasses import replace

import pytest
import torch
from tiny_grids import PAIRS, bits

from qat.nn.estimators import Clipped
from qat.nn.fake_quantize import FakeQuantize, Phase
from qat.nn.observers.minmax import MinMax
from qat.nn.quantized_input import QuantizedInput

INPUTS = {name: input for name, (_, input) in PAIRS.items() if input is not None}


def trained(scheme, x):
    """What training has of an input, after it saw x, and what is stored of it."""
    shape = None if scheme.dynamic else (1,)
    quant = FakeQuantize(scheme, shape, MinMax(), Clipped(), torch.bfloat16, "x", running=True)
    quant.train()
    quant(x, torch.float32)
    quant.phase = Phase.FROZEN
    if scheme.dynamic:
        return quant, QuantizedInput(scheme, global_scale=quant.global_scale)
    return quant, QuantizedInput(scheme, *quant.qparams())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", INPUTS)
def test_it_is_trainings_bit_for_bit(name, dtype):
    x = torch.randn(2, 5, 64)
    quant, served = trained(INPUTS[name], x)
    for y in (x.to(dtype), 3 * x.to(dtype), torch.zeros(1, 1, 64, dtype=dtype)):
        assert torch.equal(bits(served(y)), bits(quant(y, dtype)))
        assert torch.equal(bits(served(y[0, :1])), bits(quant(y, dtype)[0, :1]))  # whoever comes beside it


@pytest.mark.parametrize("name", INPUTS)
def test_in_fp64_only_the_result_is_wider(name):
    x = torch.randn(3, 64, dtype=torch.float64)
    _, served = trained(INPUTS[name], x.float())
    assert torch.equal(served(x), served(x.float()).double())


def test_equal_is_what_rounds_alike():
    x = torch.randn(4, 64)
    static, dynamic = INPUTS["w8a8_static"], INPUTS["w8a8"]
    _, one = trained(static, x)
    _, same = trained(static, x)
    _, other = trained(static, 2 * x)
    assert one.equals(one.to("cpu"))
    assert one.equals(same)
    assert not one.equals(other)
    assert not one.equals(replace(one, zero_point=one.zero_point + 1))
    assert not one.equals(replace(one, scale=one.scale.float()))
    assert not one.equals(None)
    assert QuantizedInput(dynamic).equals(QuantizedInput(dynamic))
    assert not QuantizedInput(dynamic).equals(QuantizedInput(replace(dynamic, convention="ct")))
    assert (one.nbytes, QuantizedInput(dynamic).nbytes) == (3, 0)


def test_parts_that_are_not_the_schemes_are_refused():
    static, scale = INPUTS["fp8_static"], torch.ones(1)
    with pytest.raises(ValueError, match=r"e4m3_tensor: found \[\], stored are \['input_scale'\]"):
        QuantizedInput(static)
    with pytest.raises(ValueError, match=r"found \['input_scale'\], stored are \[\]"):
        QuantizedInput(INPUTS["fp8"], scale)
    with pytest.raises(ValueError, match=r"stored are \['input_global_scale'\]"):
        QuantizedInput(INPUTS["nvfp4"], scale)
