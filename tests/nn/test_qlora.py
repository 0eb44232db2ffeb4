"""QLoRALinear against its closed form, and how far its merge is from what was trained: bounds, and 0 for LoRA-QAT."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from qat.nn.lora import LowRank
from qat.nn.qlora import NF4, QLoRALinear
from qat.numerics.affine import dequantize, quantize, rtn
from qat.numerics.granularity import PerGroup
from qat.numerics.grid import IntGrid
from qat.numerics.scheme import Scheme

IN, OUT, RANK, ALPHA = 128, 48, 4, 10.0
S = ALPHA / RANK


def make(bias=True, dropout=0.0, storage=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    linear, thin = nn.Linear(IN, OUT, bias), LowRank(OUT, IN, RANK, ALPHA, generator)
    with torch.no_grad():
        thin.B.copy_(torch.randn(OUT, RANK, generator=generator) * 0.05)
    return linear, QLoRALinear(linear, thin, 64, dropout, storage)


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_is_round_to_nearest_on_nf4(storage, dtype):
    linear, module = make(storage=storage)
    codes, scale, _ = rtn(linear.weight.detach(), Scheme(NF4, PerGroup(64)), storage)
    assert torch.equal(module.base(dtype), dequantize(codes, scale, None, dtype, NF4))
    stored = module.words.numel() * 32 + module.scale.numel() * 8 * storage.itemsize
    assert stored / linear.weight.numel() == 4 + 8 * storage.itemsize / 64


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(IN,), (3, IN), (2, 5, IN), (0, IN)])
def test_it_is_equation_5(bias, shape):
    linear, module = make(bias)
    x, thin = torch.randn(shape), module.adapter
    expected = F.linear(x, module.base(torch.float32), linear.bias) + S * x @ thin.A.T @ thin.B.T
    assert torch.allclose(module(x), expected, atol=1e-5)


def test_under_autocast_all_products_are_bf16():
    _, module = make()
    x, seen = torch.randn(3, IN), []
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
        out.float().sum().backward()
    seen = [p.grad.dtype for p in (module.adapter.A, module.adapter.B)]
    assert out.dtype == torch.bfloat16
    assert seen == [torch.float32] * 2


def test_gradients_are_those_of_the_closed_form():
    linear, module = make()
    x, grad = torch.randn(5, IN, requires_grad=True), torch.randn(5, OUT)
    module(x).backward(grad)
    thin, own = module.adapter, x.detach().clone().requires_grad_()
    a, b = (p.detach().clone().requires_grad_() for p in (thin.A, thin.B))
    (F.linear(own, module.base(torch.float32), linear.bias) + S * own @ a.T @ b.T).backward(grad)
    for mine, other in ((x, own), (thin.A, a), (thin.B, b)):
        assert torch.allclose(mine.grad, other.grad, rtol=1e-4, atol=1e-4)


def test_the_dense_weight_is_not_kept_for_backward():
    _, module = make()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        module(torch.randn(3, IN))
    assert max(saved) < IN * OUT


def test_dropout_acts_on_the_adapter_alone_and_in_training_alone():
    _, module = make(dropout=0.5)
    x = torch.randn(3, IN)
    base = F.linear(x, module.base(torch.float32), module.bias)
    assert not torch.equal(module.train()(x), module(x))
    assert torch.equal(module.eval()(x), module(x))
    with torch.no_grad():
        module.adapter.B.zero_()
    assert torch.equal(module.train()(x), base)


def test_a_compiled_module_computes_the_same():
    _, module = make()
    x = torch.randn(3, IN)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), module(x))
    torch._dynamo.reset()


@pytest.mark.parametrize(("storage", "u"), [(torch.bfloat16, 2.0**-8), (torch.float32, 2.0**-24)])
def test_merging_moves_outputs_by_no_more_than_the_storage_dtypes_rounding(storage, u):
    """|y' - y| <= u |x| |W + s B A|^T + rounding of the products; and where u matters, it is used up."""
    _, module = make(bias=False)
    x = torch.randn(64, IN)
    with torch.no_grad():
        exact = module.base(torch.float32).double() + S * module.adapter.B.double() @ module.adapter.A.double()
        merged = module.merged().to(storage)
        thin = S * module.adapter.B.abs().double() @ module.adapter.A.abs().double()
        noise = 4 * IN * 2.0**-24 * (exact.abs() + thin)  # fp32 sums of 128 products, on both sides
        assert bool(((merged.double() - exact).abs() <= u * exact.abs() + noise).all())
        difference = (F.linear(x, merged.float()) - module(x)).abs().double()
    assert bool((difference <= x.abs().double() @ (u * exact.abs() + noise).T).all())
    if storage is torch.bfloat16:
        assert float(((merged.double() - exact).abs() / exact.abs()).max()) > 0.9 * u
        assert float(difference.max()) > 0


def test_quantizing_the_merged_weight_moves_it_by_up_to_half_a_step_again():
    """The second rounding is that of the recipe's grid; LoRA-QAT, which trains behind it, has none."""
    _, module = make()
    merged = module.merged().detach().bfloat16().float()
    rule = Scheme(IntGrid(4), PerGroup(64))
    codes, scale, _ = rtn(merged, rule, torch.bfloat16)
    step = scale.float().repeat_interleave(64, 1)
    moved = (dequantize(codes, scale, None, torch.float32) - merged).abs()
    assert bool((moved <= step / 2 + merged.abs() * 2.0**-8).all())
    assert float((moved / step).max()) > 0.45
    again = dequantize(codes, scale, None, torch.float32)
    assert torch.equal(quantize(again, scale, None, rule.grid), codes)
