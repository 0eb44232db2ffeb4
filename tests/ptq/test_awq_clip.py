"""Clipping never loses to the range that would be served without it, in the error that it weighs, group by group."""

from dataclasses import replace

import pytest
import torch
from tiny import scheme

from qat.nn.observers.base import Observer
from qat.nn.observers.minmax import MinMax
from qat.nn.observers.mse import MSE
from qat.numerics.affine import dequantize, qparams, quantize, ranges
from qat.numerics.granularity import PerChannel, PerTensor
from qat.numerics.grid import IntGrid
from qat.numerics.scheme import Scheme
from qat.ptq.awq_clip import FACTORS, clipped_range, clips

SCHEMES = [scheme(2), scheme(3), scheme(3, symmetric=False), Scheme(IntGrid(3), PerChannel()),
           Scheme(IntGrid(3), PerTensor())]  # fmt: skip


@pytest.mark.parametrize("observer", [MinMax(), MSE(10, 0.5)], ids=["minmax", "mse"])
@pytest.mark.parametrize("how", SCHEMES, ids=str)
def test_a_clipped_range_never_loses_to_the_observers(how, observer):
    """Against partial products over all tokens, which the search never sees: it has their Gram matrices."""
    weight, x = torch.randn(16, 64), torch.randn(100, 64) @ torch.randn(64, 64)
    errors = []
    for bounds in (
        clipped_range(weight, x.T @ x / 100, how, observer, torch.bfloat16),
        observer.observe(weight, how, torch.bfloat16),
    ):
        scale, zero = qparams(*bounds, how, torch.bfloat16)
        rounded = dequantize(quantize(weight, scale, zero, how.grid), scale, zero, torch.float32)
        groups = scale.shape[-1] if scale.dim() == 2 else 1
        change = (rounded - weight).view(16, groups, -1)
        parts = torch.einsum("tgi,ogi->tog", x.view(100, groups, -1), change).square().mean(0)
        errors.append(parts.reshape(*scale.shape, -1).sum(-1))
    assert bool((errors[0] <= errors[1] * (1 + 1e-4)).all())
    if how.grid.bits == 2 or how.symmetric is False or observer != MinMax():
        assert errors[0].sum() < errors[1].sum()


class Tenth(Observer):
    """A range that nobody would serve: a tenth of each group's."""

    def observe(self, x, scheme, dtype, g=None):
        low, high = ranges(x, scheme)
        return low / 10, high / 10


def test_a_signed_range_is_tried_with_either_sign():
    """Against every candidate, one after the other."""
    how, weight, x = replace(scheme(2), convention="signed"), torch.randn(16, 64), torch.randn(100, 64)
    parts = x.view(100, 2, 32)

    def error(low, high):
        scale, _ = qparams(low, high, how, torch.bfloat16)
        rounded = dequantize(quantize(weight, scale, None, how.grid), scale, None, torch.float32)
        return torch.einsum("tgi,ogi->tog", parts, (rounded - weight).view(16, 2, 32)).square().mean(0)

    low, high = ranges(weight, how)
    ends = [(low * f, high * f) for f in FACTORS] + [(-high * f, -low * f) for f in FACTORS]
    best = torch.stack([error(*one) for one in ends]).amin(0)
    found = clipped_range(weight, x.T @ x / 100, how, MinMax(), torch.bfloat16)
    assert torch.allclose(error(*found), best, rtol=1e-3)
    longer = qparams(low, high, how, torch.bfloat16)[0].sign()
    assert bool((qparams(*found, how, torch.bfloat16)[0].sign() != longer).any())


@pytest.mark.parametrize("how", SCHEMES, ids=str)
def test_what_shrinks_is_the_groups_own_range_whatever_the_observers(how):
    weight, x = torch.randn(16, 64), torch.randn(100, 64)
    found, own = (clipped_range(weight, x.T @ x / 100, how, o, torch.bfloat16) for o in (Tenth(), MinMax()))
    assert all(torch.equal(a, b) for a, b in zip(found, own, strict=True))


def test_queries_and_keys_are_exempt():
    names = [f"self_attn.{n}_proj" for n in "qkvo"] + ["mlp.down_proj"]
    assert [name for name in names if not clips(name)] == ["self_attn.q_proj", "self_attn.k_proj"]
