"""Orthogonal to the last bits, of every order that is claimed, and a function of the seed alone."""

import pytest
import torch

from qat.numerics.orthogonal import hadamard, random_orthogonal


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("n", [1, 2, 4, 8, 12, 20, 24, 28, 36, 44, 60, 64, 72, 96, 128, 448, 576, 768, 896, 960])
def test_a_hadamard_matrix_has_entries_of_one_and_orthogonal_rows(n):
    matrix = hadamard(n)
    assert bool((matrix.abs() == 1).all())
    assert torch.equal(matrix @ matrix.T, n * torch.eye(n, dtype=torch.float64))


@pytest.mark.parametrize("n", [3, 6, 18, 52, 92])
def test_an_order_that_is_not_made_here_is_named(n):
    """52 = 51 + 1 = 2 (25 + 1), and neither 51 nor 25 is a prime; 3, 6 and 18 have no such matrix at all."""
    with pytest.raises(ValueError, match=f"no Hadamard matrix of order {n} is made here; use kind=orthogonal"):
        hadamard(n)


@pytest.mark.parametrize("kind", ["hadamard", "orthogonal"])
@pytest.mark.parametrize("n", [16, 36])
def test_a_random_matrix_is_orthogonal_and_a_function_of_the_seed(kind, n):
    matrix = random_orthogonal(n, kind, generator())
    assert matrix.dtype == torch.float64
    assert torch.allclose(matrix @ matrix.T, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-14)
    assert torch.equal(matrix, random_orthogonal(n, kind, generator()))
    assert not torch.equal(matrix, random_orthogonal(n, kind, generator(1)))


def test_uniform_matrices_have_no_preferred_sign():
    """QR alone has: its R has a diagonal of one sign, and traces of Q are biased."""
    source = generator()
    entries = torch.stack([random_orthogonal(3, "orthogonal", source) for _ in range(2000)])
    assert entries.mean(0).abs().max() < 0.06
    assert torch.allclose(entries.square().mean(0), torch.full((3, 3), 1 / 3, dtype=torch.float64), atol=0.03)


def test_an_outlier_is_spread_evenly():
    x = torch.zeros(576, dtype=torch.float64)
    x[5] = 24.0
    assert torch.allclose((x @ random_orthogonal(576, "hadamard", generator())).abs(), torch.ones(576).double())


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="kind='fourier': one of hadamard, orthogonal"):
        random_orthogonal(4, "fourier", generator())
