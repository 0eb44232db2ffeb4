import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import scheme
from torch import nn

from qat.nn.estimators import LSQ, Clipped
from qat.nn.fake_quantize import FakeQuantize, Phase
from qat.nn.linear import QATLinear
from qat.nn.observers.minmax import MinMax
from qat.numerics.affine import dequantize, rtn
from qat.numerics.granularity import PerToken
from qat.numerics.grid import IntGrid
from qat.numerics.scheme import Scheme


def make(linear, input=None):
    weight = FakeQuantize(scheme(), tuple(linear.weight.shape), MinMax(), LSQ(), torch.bfloat16, "w")
    weight.observe(linear.weight)
    weight.phase = Phase.LEARN
    return QATLinear.from_float(linear, weight, input)


@pytest.mark.parametrize("bias", [True, False])
def test_takes_over_parameters_and_names(bias):
    linear = nn.Linear(64, 16, bias=bias)
    quantized = make(linear)
    assert quantized.weight is linear.weight
    assert quantized.bias is linear.bias
    assert set(linear.state_dict()) <= set(quantized.state_dict())


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 5, 64), (0, 64)])
def test_multiplies_with_the_dequantized_weight(shape):
    linear = nn.Linear(64, 16)
    quantized, x = make(linear), torch.randn(shape)
    codes, scale, _ = rtn(linear.weight.detach(), scheme(), torch.bfloat16)
    assert torch.equal(quantized(x), F.linear(x, dequantize(codes, scale, None, torch.float32), linear.bias))


def test_under_autocast_the_weight_is_rounded_once_to_bf16():
    linear = nn.Linear(64, 16)
    quantized, x = make(linear), torch.randn(3, 64)
    codes, scale, _ = rtn(linear.weight.detach(), scheme(), torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        out = quantized(x)
    expected = F.linear(x.bfloat16(), dequantize(codes, scale, None, torch.bfloat16), linear.bias.bfloat16())
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, expected)


def test_switched_off_it_is_nn_linear_for_ten_optimizer_steps_bit_for_bit():
    linear = nn.Linear(64, 16)
    quantized = make(copy.deepcopy(linear))
    quantized.weight_fake_quant.phase = Phase.OFF
    optimizers = [torch.optim.AdamW([m.weight, m.bias], lr=1e-2) for m in (linear, quantized)]
    for step in range(10):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(step))
        for module, optimizer in zip((linear, quantized), optimizers, strict=True):
            optimizer.zero_grad()
            module(x).square().mean().backward()
            optimizer.step()
        assert torch.equal(linear.weight, quantized.weight)
        assert torch.equal(linear.bias, quantized.bias)


def test_inputs_are_quantized_per_token():
    token = Scheme(IntGrid(8), PerToken(), dynamic=True)
    linear = nn.Linear(64, 16)
    quantized = make(linear, FakeQuantize(token, None, MinMax(), LSQ(), torch.bfloat16, "x"))
    x = torch.randn(3, 64)
    codes, scale, _ = rtn(x, token, torch.float32)
    rounded = dequantize(codes, scale, None, torch.float32)
    assert torch.equal(quantized(x), make(linear)(rounded))


def test_compiled_with_a_dynamic_input_it_is_one_graph_and_computes_the_same():
    token = Scheme(IntGrid(8), PerToken(), dynamic=True, convention="vllm")
    quantized = make(nn.Linear(64, 16), FakeQuantize(token, None, MinMax(), Clipped(), torch.bfloat16, "x"))
    x, grad, found = torch.randn(2, 5, 64), torch.randn(2, 5, 16), []
    torch._dynamo.reset()
    for call in (quantized, torch.compile(quantized, backend="aot_eager", fullgraph=True)):
        quantized.zero_grad(set_to_none=True)
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = call(leaf)
        y.backward(grad.to(y.dtype))
        found.append([y, leaf.grad, *(p.grad for p in quantized.parameters() if p.requires_grad)])
    assert all(torch.equal(eager, compiled) for eager, compiled in zip(*found, strict=True))
    torch._dynamo.reset()
