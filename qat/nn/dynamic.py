"""Fake-quantization on a scale that the tensor itself gives, as one opaque operator: range, scale and rounding.

Shapes: x `[..., I]`, global_scale `[1]`; results: of x's shape in `dtype`, the served scales in fp32, and the zero
points, int8 (an empty tensor on symmetric schemes), both of the scheme's scale shape. The range is an observer's, so
the operator lives here and not among the kernels.

Opaque from the range on: a compiler's division would move scales by a last bit, and codes with them. On a GPU min-max
ranges of tokens and groups are one Triton kernel (`fused_dynamic` says which), with the same bits.
"""

import torch
from torch import Tensor

from qat.kernels.fake_quant import fake_quantize, fused, show
from qat.nn.interned import interned
from qat.nn.observers.base import Observer
from qat.nn.observers.minmax import MinMax
from qat.numerics.granularity import PerGroup, PerToken
from qat.numerics.scheme import E4M3, E8M0, Scheme

LARGEST = 1 << 14  # elements of a group that a program of the Triton kernel holds


def fused_dynamic(observer: Observer, scheme: Scheme, features: int) -> bool:
    """Whether the Triton kernel knows the range and the scale, of tensors of so many features."""
    size = scheme.granularity.group_size if isinstance(scheme.granularity, PerGroup) else features
    scales = scheme.scale_dtype in (None, "float32", E4M3, E8M0)
    beside = isinstance(scheme.granularity, PerGroup | PerToken)
    return type(observer) is MinMax and scheme.symmetric and beside and scales and size <= LARGEST


def dynamic_reference(
    x: Tensor,
    global_scale: Tensor | None,
    strength: Tensor | None,
    scheme: Scheme,
    observer: Observer,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the operator computes, in plain torch but for the rounding; see `fake_quantize_dynamic`."""
    scale, zero_point = observer.qparams(x, scheme, torch.float32, global_scale, check=False)
    result, s = fake_quantize(
        x, scale, scheme.grid, dtype, zero_point=zero_point, global_scale=global_scale, strength=strength
    )
    return result, s, x.new_empty(0, dtype=torch.int8) if zero_point is None else zero_point.contiguous()


@torch.library.custom_op("qat::fake_quantize_dynamic", mutates_args=())
def _dynamic(
    x: Tensor,
    global_scale: Tensor | None,
    strength: Tensor | None,
    scheme: str,
    observer: str,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    how, watches = interned(scheme), interned(observer)
    if fused(x.device.type, x.dtype, how.grid, strength is not None) and fused_dynamic(watches, how, x.shape[-1]):
        from qat.kernels.triton.fake_quant_dynamic import fake_quantize_dynamic as twin

        result, s = twin(x, global_scale, how, dtype)
        show(s, result, None)
        return result, s, x.new_empty(0, dtype=torch.int8)
    return dynamic_reference(x, global_scale, strength, how, watches, dtype)


@_dynamic.register_fake
def _(x, global_scale, strength, scheme, observer, dtype):
    how = interned(scheme)
    shape = how.granularity.scale_shape(tuple(x.shape))
    s = x.new_empty(shape, dtype=torch.float32)
    return x.new_empty(x.shape, dtype=dtype), s, x.new_empty(0 if how.symmetric else shape, dtype=torch.int8)


def fake_quantize_dynamic(
    x: Tensor,
    scheme: str,
    observer: str,
    dtype: torch.dtype,
    *,
    global_scale: Tensor | None = None,
    strength: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Equal, bit for bit, to `kernels.fake_quant.fake_quantize` on what the observer finds.

    Args:
        x: The tensor.
        scheme: Name of a dynamic scheme, interned.
        observer: Name of what finds its range, interned.
        dtype: Of the result.
        global_scale: Divisor of a two-level scheme.
        strength: See `fake_quantize`.

    Returns:
        The result; the served scale, fp32; and the zero point, which symmetric schemes have none of.
    """
    result, s, zero_point = _dynamic(x, global_scale, strength, scheme, observer, dtype)
    return result, s, zero_point if len(zero_point) else None
