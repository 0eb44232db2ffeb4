"""Products of activations are summed as in fp32, whatever multiplies them."""

import pytest
import torch

from qat.kernels import gram
from qat.kernels.gram import add_product, add_product_of_difference, split

MM = torch.mm


def activations(tokens=96, features=24, seed=0, device="cpu"):
    """Two of bf16 that differ by some percent, of sizes that vary by feature."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.logspace(-3, 2, features)
    a = torch.randn(tokens, features, generator=generator) * size
    b = a + 0.05 * torch.randn(tokens, features, generator=generator) * size
    return a.bfloat16().to(device), b.bfloat16().to(device)


def bound(a, b, terms):
    """Of an fp32 sum of so many terms."""
    return terms * 2.0**-23 * (a.double().abs().T @ b.double().abs())


@pytest.fixture
def cores(monkeypatch):
    """Tensor cores, as they are defined: exact products, summed in fp32."""

    def mm(a, b, out_dtype):
        assert a.dtype == b.dtype == torch.bfloat16
        return MM(a.to(out_dtype), b.to(out_dtype))

    monkeypatch.setattr(gram, "_exact", lambda total, a, b: True)
    monkeypatch.setattr(torch, "mm", mm)


def test_the_product_of_two_bf16_numbers_is_exact_in_fp32():
    """Of all significands; exponents only shift them."""
    significands = torch.arange(128, 256).bfloat16()
    products = significands.float()[:, None] * significands.float()
    assert torch.equal(products.double(), significands.double()[:, None] * significands.double())
    a, b = activations(4096)
    assert torch.equal((a.float() * b.float()).double(), a.double() * b.double())


def test_what_bf16_holds_of_a_number_and_of_the_rest_is_within_its_bound():
    x = torch.randn(10000) * torch.logspace(-20, 20, 10000)
    high, low = split(x)
    error = (high.double() + low.double() - x.double()).abs()
    assert bool((error <= 2.0**-17 * x.double().abs()).all())
    assert bool((error > 2.0**-19 * x.double().abs()).any())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_reference_is_the_matrix_product_of_the_widened_activations(dtype):
    a, b = activations()
    total = torch.randn(24, 24, dtype=dtype)
    expected = total.addmm(a.to(dtype).T, b.to(dtype), alpha=2.0)
    add_product(total, a, b, 2.0)
    assert torch.equal(total, expected)
    expected = total.addmm((a.to(dtype) - b.to(dtype)).T, b.to(dtype), alpha=2.0)
    add_product_of_difference(total, a, b, b, 2.0)
    assert torch.equal(total, expected)


def test_on_tensor_cores_sums_are_the_references(cores):
    a, b = activations()
    start = torch.randn(24, 24)
    total = start.clone()
    add_product(total, a, b, 2.0)
    exact = 2 * a.double().T @ b.double()
    assert bool(((total.double() - start.double() - exact).abs() <= 2 * bound(a, b, len(a)) + 1e-6).all())


def test_on_tensor_cores_a_difference_loses_nothing_to_cancellation(cores):
    """Its bound is one of the difference's size; and inputs that do not differ add exactly nothing."""
    a, b = activations()
    difference = a.double() - b.double()
    total = torch.zeros(24, 24)
    add_product_of_difference(total, a, b, b)
    allowed = (len(a) * 2.0**-23 + 2.0**-17) * (difference.abs().T @ b.double().abs())
    assert bool(((total.double() - difference.T @ b.double()).abs() <= allowed).all())
    before = total.clone()
    add_product_of_difference(total, b, b, b)
    assert torch.equal(total, before)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [96, 8192, 32768])
def test_tensor_cores_keep_the_bound_of_an_fp32_sum(tokens):
    a, b = activations(tokens, 256, device="cuda")
    assert gram._exact(torch.zeros(1, device="cuda"), a, b)
    total, difference = torch.zeros(2, 256, 256, device="cuda")
    for part in range(0, tokens, 8192):
        add_product(total, a[part : part + 8192], b[part : part + 8192])
        add_product_of_difference(difference, *(x[part : part + 8192] for x in (a, b, b)))
    error = (total.double() - a.double().T @ b.double()).abs()
    print(f"of the bound: {float((error / bound(a, b, tokens)).max()):.1e}")
    assert bool((error <= bound(a, b, tokens)).all())
    apart = a.double() - b.double()
    allowed = (tokens * 2.0**-23 + 2.0**-17) * (apart.abs().T @ b.double().abs())
    assert bool(((difference.double() - apart.T @ b.double()).abs() <= allowed).all())
