"""AWQ's clipping: for every group, the range that keeps the group's part of the output best (the code's `auto_clip`).

Legend: O out-features, I in-features, T tokens. The error of a group g is `E (x_g . dw_g)^2 = dw_g^T G_g dw_g` with
`G = x^T x / T`. Deviations from the paper's code: every token counts, through the Gram matrix, not a sample of them;
the observer's range is among the candidates, so no group ends worse than without clipping; both ends of an asymmetric
range shrink by the same factor, where the code cuts both at one absolute value; scales are rounded as stored.
"""

import torch
from torch import Tensor

from qat.nn.observers.base import Observer, Range
from qat.numerics.affine import dequantize, qparams, quantize, ranges, shrunken
from qat.numerics.scheme import Scheme

EXEMPT = ("q_proj", "k_proj")  # their outputs meet in a softmax: an error of one alone says little
FACTORS = tuple(1 - i / 20 for i in range(10))


def clips(name: str) -> bool:
    """Whether a linear's ranges are clipped: those of queries and keys are not."""
    return not name.endswith(EXEMPT)


def clipped_range(
    weight_OI: Tensor,
    gram_II: Tensor,
    scheme: Scheme,
    observer: Observer,
    dtype: torch.dtype,
    g: Tensor | None = None,
) -> Range:
    """The observer's range or a shrunken min-max one, whichever keeps a group's output best.

    Args:
        weight_OI: The weight, after scaling.
        gram_II: `x^T x / T` of its inputs, scaled likewise.
        scheme: How it will be quantized.
        observer: Finds the range that is served if no shrunken one is better.
        dtype: Storage dtype of the scales.
        g: Divisor of a two-level scheme.
    """
    low, high = ranges(weight_OI, scheme)
    columns = weight_OI.shape[1] // (low.shape[1] if low.dim() == 2 else 1)
    grams = torch.stack([rows[:, i * columns :][:, :columns] for i, rows in enumerate(gram_II.split(columns))])

    def error(lo: Tensor, hi: Tensor) -> Tensor:
        scale, zero_point = qparams(lo, hi, scheme, dtype, g)
        codes = quantize(weight_OI, scale, zero_point, scheme.grid, g)
        rounded = dequantize(codes, scale, zero_point, torch.float32, scheme.grid, g)
        change = (rounded - weight_OI).view(len(weight_OI), -1, columns)
        errors = (torch.einsum("ogi,gij->ogj", change, grams) * change).sum(-1)
        return errors.reshape(*lo.shape, -1).sum(-1)

    best_lo, best_hi = observer.observe(weight_OI, scheme, dtype, g)
    best = error(best_lo, best_hi)
    for lo, hi in shrunken(low, high, FACTORS, scheme):
        found = error(lo, hi)
        better = found < best
        best = torch.where(better, found, best)
        best_lo, best_hi = torch.where(better, lo, best_lo), torch.where(better, hi, best_hi)
    return best_lo, best_hi
