"""LowRank: the sum and its gradients, in full fp32 whatever is switched on around it."""

import pytest
import torch
from tiny import scheme
from torch import nn

from qat.nn.estimators import LSQ, Clipped
from qat.nn.fake_quantize import FakeQuantize, Phase, kept
from qat.nn.linear import QATLinear
from qat.nn.lora import LowRank, _add_low_rank, _Merge, checksum, frozen
from qat.nn.observers.minmax import MinMax
from qat.nn.observers.mse import MSE
from qat.numerics.granularity import PerGroup
from qat.numerics.grid import IntGrid
from qat.numerics.scheme import Scheme

IN, OUT, RANK, ALPHA = 64, 48, 4, 10.0


def low_rank(seed=0):
    generator = torch.Generator().manual_seed(seed)
    thin = LowRank(OUT, IN, RANK, ALPHA, generator)
    with torch.no_grad():
        thin.B.copy_(torch.randn(OUT, RANK, generator=generator) * 0.05)
    return thin


def adapted(estimator=None, bits=4):
    torch.manual_seed(0)
    linear = nn.Linear(IN, OUT)
    quant = FakeQuantize(scheme(bits), (OUT, IN), MinMax(), estimator or LSQ(), torch.bfloat16, "w")
    quant.observe(linear.weight)
    quant.phase = Phase.LEARN
    module = QATLinear.from_float(linear, quant)
    module.adapter = low_rank()
    module.weight.requires_grad_(False)
    return module


def test_it_is_equation_3_and_starts_at_0():
    thin, weight = low_rank(), torch.randn(OUT, IN)
    expected = weight.double() + ALPHA / RANK * (thin.B.double() @ thin.A.double())
    assert torch.allclose(thin.merged(weight).double(), expected, rtol=0, atol=1e-6)
    fresh = LowRank(OUT, IN, RANK, ALPHA, torch.Generator())
    assert torch.equal(fresh.merged(weight), weight)
    assert float(fresh.A.detach().abs().max()) <= IN**-0.5  # Kaiming-uniform with a = sqrt(5)
    assert float(fresh.A.detach().abs().max()) > 0.9 * IN**-0.5


def test_its_gradients_are_those_of_the_closed_form():
    thin, weight = low_rank().double(), torch.randn(OUT, IN, dtype=torch.float64)
    small = [part.detach().clone().requires_grad_() for part in (weight[:6, :5], thin.B[:6], thin.A[:, :5])]
    assert torch.autograd.gradcheck(lambda *parts: _Merge.apply(*parts, ALPHA / RANK), small)
    grad = torch.randn(OUT, IN, dtype=torch.float64)
    thin.merged(weight).backward(grad)
    assert torch.allclose(thin.A.grad, ALPHA / RANK * thin.B.T @ grad)
    assert torch.allclose(thin.B.grad, ALPHA / RANK * grad @ thin.A.T)


@pytest.mark.parametrize("estimator", [LSQ(), Clipped()], ids=lambda e: type(e).__name__)
def test_gradients_through_the_rounding_are_the_estimators_times_a_and_b(estimator):
    """dA = s B^T M and dB = s M A^T with M the estimator's gradient of the sum; that of the scale is unchanged."""
    module, plain = adapted(estimator), adapted(estimator)
    x, s = torch.randn(5, IN), ALPHA / RANK
    master = plain.master().detach().requires_grad_()
    plain.adapter, plain.weight = None, nn.Parameter(master.detach())
    for linear in (module, plain):
        linear(x).square().sum().backward()
    m = plain.weight.grad
    assert int(m.count_nonzero()) > 0
    assert torch.allclose(module.adapter.A.grad, s * module.adapter.B.T @ m, rtol=1e-4, atol=1e-4)
    assert torch.allclose(module.adapter.B.grad, s * m @ module.adapter.A.T, rtol=1e-4, atol=1e-4)
    if estimator.learns_scale:
        assert torch.equal(module.weight_fake_quant.log_step.grad, plain.weight_fake_quant.log_step.grad)
    assert module.weight.grad is None


def test_neither_autocast_nor_tf32_nor_a_compiler_changes_a_bit(monkeypatch):
    thin, weight, seen, addmm = low_rank(), torch.randn(OUT, IN), [], torch.addmm
    expected = thin.merged(weight)
    record = lambda *a, **k: seen.append(torch.get_float32_matmul_precision()) or addmm(*a, **k)  # noqa: E731
    monkeypatch.setattr(torch, "addmm", record)
    rough = weight + ALPHA / RANK * (thin.B.bfloat16() @ thin.A.bfloat16()).float()
    assert not torch.equal(rough, expected)  # so the next lines say something
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(thin.merged(weight), expected)
            assert torch.get_float32_matmul_precision() == "medium"
            assert seen == ["highest"]  # a CPU may not have what is lower
    finally:
        torch.set_float32_matmul_precision("highest")
    compiled = torch.compile(lambda w: thin.merged(w) * 1.0, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(weight), expected)
    torch._dynamo.reset()


def test_the_operator_is_well_formed():
    thin = low_rank()
    arguments = (torch.randn(OUT, IN), thin.B.detach(), thin.A.detach(), 2.0)
    torch.library.opcheck(_add_low_rank, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_rounded_weight_is_that_of_the_codes_of_the_sum(dtype):
    module = adapted()
    quant = module.weight_fake_quant
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        rounded = module.rounded(dtype)
    codes = quant.codes(module.master())
    expected = (codes.float().view(OUT, -1, 32) * quant.qparams()[0].float().unsqueeze(-1)).to(dtype).view(OUT, IN)
    assert torch.equal(rounded, expected)
    assert not torch.equal(codes, quant.codes(module.weight))


def test_switched_off_it_is_lora_in_full_precision():
    module, x = adapted(), torch.randn(3, IN)
    module.weight_fake_quant.phase = Phase.OFF
    thin = module.adapter
    expected = module.bias + x @ module.weight.T + ALPHA / RANK * (x @ thin.A.T) @ thin.B.T
    assert torch.allclose(module(x), expected, atol=1e-5)


def test_sums_are_not_kept_for_backward():
    """One matrix of the weight's size is: the rounded weight, which the product with the inputs needs."""
    module, sizes = adapted(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.append(tuple(t.shape)) or t, lambda t: t):
        module(torch.randn(3, IN, requires_grad=True))
    assert sizes.count((OUT, IN)) + sizes.count((IN, OUT)) == 1


def test_kept_weights_are_merged_once(monkeypatch):
    module, calls = adapted(), []
    merged = LowRank.merged
    monkeypatch.setattr(LowRank, "merged", lambda self, w: calls.append(1) or merged(self, w))
    x = torch.randn(3, IN)
    first = module(x)
    assert len(calls) == 1
    with kept(module):
        assert torch.equal(module(x), first)
        assert torch.equal(module(x), first)
    assert len(calls) == 2


@pytest.mark.parametrize("share", [0.005, 0.01, 0.03])
def test_what_others_ship_is_not_what_they_trained(share):
    """FQ(W) + s B A trained, Q(W + s B A) shipped: off by several times the adapter. Here the difference is 0."""
    module = adapted(bits=4)
    theirs = Scheme(IntGrid(4), PerGroup(32))  # what others train has no signs
    quant = FakeQuantize(theirs, (OUT, IN), MSE(20), LSQ(), torch.bfloat16, "w")
    quant.observe(module.weight)
    with torch.no_grad():
        change = module.master() - module.weight
        module.adapter.B.mul_(share * module.weight.square().mean().sqrt() / change.square().mean().sqrt())
        change = module.master() - module.weight
        shipped = quant(module.master(), torch.float32)
        trained = quant(module.weight, torch.float32) + change
    assert float((shipped - trained).square().mean().sqrt()) > 2 * float(change.square().mean().sqrt())


def test_what_training_leaves_alone_is_known_by_name():
    module = adapted()
    assert set(frozen(module)) == {"weight"}
    module.bias.requires_grad_(False)
    assert set(frozen(module)) == {"weight", "bias"}
    module.weight_fake_quant.log_step.requires_grad_(False)
    assert set(frozen(module)) == {"weight", "bias"}  # scales are results of the run
    assert frozen(nn.Linear(2, 2).requires_grad_(False)) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_a_checksum_tells_one_changed_word(dtype):
    x = (torch.rand(3, 5) * 100).to(dtype)
    other = x.clone()
    other[2, 3] += 1
    assert checksum(x) == checksum(x.clone()) != checksum(other)
