"""Keys and values as codes: one scale for each vector, that is for each token and head, found as it comes.

    s = absmax(x) / reach          fp32; 1 for a vector of zeros; reach: 127 for int8, 7 for int4, 448 for fp8 (e4m3)
    q = the level nearest to x / s
    x_D = round_D(fp32(q * s))

Training computes with `fake_quantize_kv`, the cache keeps what `quantize_kv` returns and is read by `dequantize_kv`:
one definition, so what the engine reads is what training saw, bit for bit, whatever the page, the chunk or the batch.

The reach of integers is 127 and 7, not the 127.5 and 7.5 of compressed-tensors' weights: with those the largest element
lies exactly between two codes, always, and the last bit of a matmul decides which one it gets. Here it lies on a level,
half a step from any other, and nothing is ever clamped.

A vector that holds inf or NaN comes back as NaN or inf everywhere, and disturbs no other.
"""

import torch
from torch import Tensor

from qat.numerics.affine import dequantize, qparams, quantize, ranges
from qat.numerics.kv import KINDS
from qat.numerics.packing import pack_nibbles, unpack_nibbles


def quantize_kv(x: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of vectors.

    Args:
        x: `[..., D]`, each vector along the last axis.
        kind: One of `numerics.kv.KINDS`.

    Returns:
        Codes as they are stored (int8: int8 `[..., D]`; int4: two in a byte, uint8 `[..., D / 2]`; fp8: bit patterns,
        uint8 `[..., D]`), and fp32 scales `[...]`.
    """
    scheme = KINDS[kind]
    scale, _ = qparams(*ranges(x, scheme), scheme, torch.float32, check=False)
    codes = quantize(x, scale, None, scheme.grid)
    return pack_nibbles(codes) if kind == "int4" else codes, scale.squeeze(-1)


def dequantize_kv(codes: Tensor, scale: Tensor, kind: str, dtype: torch.dtype) -> Tensor:
    """Vectors `[..., D]` in `dtype` from what `quantize_kv` returned."""
    codes = unpack_nibbles(codes) if kind == "int4" else codes
    return dequantize(codes, scale.unsqueeze(-1), None, dtype, KINDS[kind].grid)


@torch.library.custom_op("qat::fake_quantize_kv", mutates_args=())
def fake_quantize_kv(x: Tensor, kind: str) -> Tensor:
    """What the cache gives back for vectors `[..., D]`, in their dtype.

    One opaque operator, for the reason that `fake_quant.py` gives: a compiler may not take the division apart.
    """
    return dequantize_kv(*quantize_kv(x, kind), kind, x.dtype).contiguous()


@fake_quantize_kv.register_fake
def _(x, kind):  # type: ignore[no-untyped-def]
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
