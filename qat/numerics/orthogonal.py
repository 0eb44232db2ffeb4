"""Orthogonal matrices: Hadamard matrices with random signs where the order has one here, and uniformly random ones.

A Hadamard matrix has entries of 1 and -1 and orthogonal rows. Orders: powers of two (Sylvester), and those times the
order of a Paley matrix: `q + 1` for a prime `q = 3 mod 4` (Paley I), `2 (q + 1)` for a prime `q = 1 mod 4` (Paley II).
With signs it spreads every channel over all others evenly, which a random matrix does only on average (QuaRot,
arXiv:2404.00456, section 3). Everything is float64, and a function of the generator alone.
"""

from typing import Literal

import torch
from torch import Tensor

Kind = Literal["hadamard", "orthogonal"]


def random_orthogonal(n: int, kind: Kind, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, float64 `[n, n]`, on the CPU.

    Args:
        n: Its order.
        kind: `hadamard`: a Hadamard matrix over sqrt(n), its rows with random signs; `orthogonal`: uniform over all
            orthogonal matrices (QR of a normal one, signs of R's diagonal moved over).
        generator: Of the CPU.

    Raises:
        ValueError: `hadamard`, and no matrix of this order can be made here.
    """
    if kind == "hadamard":
        signs = torch.randint(0, 2, (n, 1), generator=generator).double() * 2 - 1
        return signs * hadamard(n) / n**0.5
    if kind != "orthogonal":
        raise ValueError(f"kind={kind!r}: one of hadamard, orthogonal")
    q, r = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return q * r.diagonal().sign()


def hadamard(n: int) -> Tensor:
    """A Hadamard matrix of order n, float64: a Paley matrix of the least order that doubles to n, doubled.

    Raises:
        ValueError: There is none, or none that is made here.
    """
    orders = [n >> k for k in reversed(range(n.bit_length())) if n % (1 << k) == 0]
    matrix = next((found for order in orders if (found := _paley(order)) is not None), None)
    if matrix is None:
        raise ValueError(f"no Hadamard matrix of order {n} is made here; use kind=orthogonal")
    while len(matrix) < n:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix


def _paley(order: int) -> Tensor | None:
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if _is_prime(q := order - 1) and q % 4 == 3:
        return torch.eye(order, dtype=torch.float64) + _bordered(q, -1.0)
    if order % 2 == 0 and _is_prime(q := order // 2 - 1) and q % 4 == 1:
        plus, minus = torch.tensor([[[1.0, 1], [1, -1]], [[1, -1], [-1, -1]]], dtype=torch.float64)
        return torch.kron(_bordered(q, 1.0), plus) + torch.kron(torch.eye(q + 1, dtype=torch.float64), minus)
    return None


def _bordered(q: int, below: float) -> Tensor:
    """The conference matrix of order q + 1: `chi(i - j)`, with 1 above and `below` to the left; chi is 1 on squares."""
    chi = torch.full((q,), -1.0, dtype=torch.float64)
    chi[torch.arange(q) ** 2 % q] = 1
    chi[0] = 0
    index = torch.arange(q)
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 1:], matrix[1:, 0] = 1, below
    matrix[1:, 1:] = chi[(index[:, None] - index) % q]
    return matrix


def _is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, int(q**0.5) + 1))
