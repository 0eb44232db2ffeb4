"""Sums of products of activations, in fp32: what Hessians and Gram matrices are made of.

Legend: T tokens, I and J features. The reference widens activations and multiplies in fp32 (TF32, which rounds them, is
torch's to allow and off by default). On a GPU bf16 activations need no widening: the product of two bf16 numbers is
exact in fp32, so tensor cores, which sum such products in fp32, compute the reference's sum in another order, some ten
times faster. Cores cut off where the reference rounds; the bound is that of any fp32 sum of T terms, T 2^-23 of the sum
of their magnitudes, and a test on a GPU holds them to it.
"""

import torch
from torch import Tensor


def add_product(total_IJ: Tensor, a_TI: Tensor, b_TJ: Tensor, alpha: float = 1.0) -> None:
    """Adds alpha a^T b in place.

    Args:
        total_IJ: The sum, fp32 (or fp64, in which the reference then computes).
        a_TI: Activations.
        b_TJ: Activations beside them.
        alpha: A factor.
    """
    if _exact(total_IJ, a_TI, b_TJ):
        total_IJ.add_(torch.mm(a_TI.T, b_TJ, out_dtype=torch.float32), alpha=alpha)
    else:
        total_IJ.addmm_(a_TI.to(total_IJ.dtype).T, b_TJ.to(total_IJ.dtype), alpha=alpha)


def add_product_of_difference(total_IJ: Tensor, a_TI: Tensor, c_TI: Tensor, b_TJ: Tensor, alpha: float = 1.0) -> None:
    """Adds alpha (a - c)^T b in place, without cancellation: the difference is taken before the product, in fp32.

    Where tensor cores multiply, it goes to them as what bf16 holds of it and what bf16 holds of the rest: two products,
    16 of its bits, all that differences of bf16 numbers of like size have. (a^T b - c^T b takes two as well, and loses
    what a and c have in common from the bits of its sums.)

    Args:
        total_IJ: The sum.
        a_TI: Activations.
        c_TI: What is taken from them.
        b_TJ: Activations beside them.
        alpha: A factor.
    """
    difference = a_TI.to(total_IJ.dtype) - c_TI
    for part in split(difference) if _exact(total_IJ, a_TI, b_TJ) else (difference,):
        add_product(total_IJ, part, b_TJ, alpha)


def split(x: Tensor) -> tuple[Tensor, Tensor]:
    """Two bf16 numbers for each of x, fp32, whose sum is within 2^-17 of it."""
    high = x.bfloat16()
    return high, (x - high).bfloat16()


def _exact(total: Tensor, a: Tensor, b: Tensor) -> bool:
    """Whether tensor cores sum the products as they are."""
    return total.is_cuda and total.dtype == torch.float32 and a.dtype == b.dtype == torch.bfloat16
