"""The reference against float64, within the bounds that its twins keep to as well; pieces change nothing."""

import pytest
import torch
from exact_divergences import DTYPES, SHAPES, case, check, exact, run

from qat.kernels import divergences
from qat.kernels.divergences import NO_TARGET, cross_entropy, cross_entropy_gradient, logsumexp


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradients_against_float64(shape, dtype):
    tensors = case(*shape, dtype)
    found = run(divergences, *tensors)
    check(found, exact(*tensors))
    for name, result in found.items():
        assert result.dtype == (dtype if name.endswith("gradient") else torch.float32), name


@pytest.mark.parametrize("piece", [9 * 7, 9 * 50, 10_000])
def test_pieces_change_nothing(piece, monkeypatch):
    monkeypatch.setattr(divergences, "PIECE", piece)
    tensors = case(9, 50, torch.float32)
    check(run(divergences, *tensors), exact(*tensors))


def test_large_logits_do_not_overflow():
    tensors = case(3, 1000, torch.float32, 1e4)
    check(run(divergences, *tensors), exact(*tensors))


def test_a_token_that_the_student_rules_out_has_no_probability():
    student, _, targets, scale = case(3, 50, torch.float32)
    student[:, 40:] = -torch.inf
    targets.clamp_(max=39)
    value, lse = cross_entropy(student, targets)
    gradient = cross_entropy_gradient(student, targets, lse, scale)
    assert torch.allclose(lse, logsumexp(student[:, :40]))
    assert bool(torch.isfinite(value).all())
    assert not gradient[:, 40:].any()


def test_without_a_target_there_is_nothing():
    student, _, targets, scale = case(4, 50, torch.float32)
    value, lse = cross_entropy(student, targets)
    absent = targets == NO_TARGET
    assert bool(absent.any())
    assert not value[absent].any()
    assert not cross_entropy_gradient(student, targets, lse, scale)[absent].any()


def test_on_a_cpu_the_reference_runs(monkeypatch):
    tensors = case(3, 7, torch.float32)
    found = divergences.kl(*tensors[:2])
    assert all(torch.equal(a, b) for a, b in zip(found, divergences.kl.__wrapped__(*tensors[:2]), strict=True))
