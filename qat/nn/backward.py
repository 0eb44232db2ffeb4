"""The gradient of a fake-quantization as one opaque operator: an estimator's rule, summed over the groups.

Shapes: grad and x `[...]`; s, zero_point and zero_step of a scale shape that groups x. Results: for x, of its shape and
dtype; for log s and z, fp32, of the scale's shape; an empty tensor for one that is not wanted. With u = x / s the
estimator says (dx, ds, dz) elementwise (`estimators.py`), and

    dlog = s sum ds        dzero = s sum dz        over the elements that share a scale

Opaque for the forward's reason: u must be the forward's u, or masks would differ from what was computed. On a GPU, for
the estimators in `MASKS`, it is one Triton kernel: dx and all masks bit for bit, sums within its stated bound.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from qat.kernels.fake_quant import fused, grid_of, served_zero
from qat.nn.estimators import LSQ, Clipped, EfficientQAT, Estimator, LSQPlus, Rounded, StraightThrough
from qat.nn.interned import interned
from qat.numerics.affine import group
from qat.numerics.grid import Grid, IntGrid
from qat.numerics.levels import snap

# What the Triton kernel knows of an estimator: its mask. All else that these have is one rule, and one factor.
MASKS: dict[type, str] = {
    StraightThrough: "all",
    Clipped: "rounded",
    EfficientQAT: "rounded",
    LSQ: "between",
    LSQPlus: "between",
}
LARGEST = 1 << 15  # elements of a group that one of its programs adds up


def fused_mask(estimator: Estimator, size: int, sums: bool) -> str | None:
    """The mask by which the Triton kernel computes an estimator's gradient of groups of `size`; None: torch does.

    Args:
        estimator: The gradient of rounding; a subclass of a known one may do anything.
        size: Elements that share a scale.
        sums: Whether gradients of scales or zero points are wanted, which one program adds up.
    """
    return MASKS.get(type(estimator)) if size <= LARGEST or not sums else None


def backward_reference(
    grad: Tensor,
    x: Tensor,
    s: Tensor,
    zero_point: Tensor | None,
    zero_step: Tensor | None,
    strength: Tensor | None,
    grid: Grid,
    estimator: Estimator,
    elements: int,
    wanted: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """What the operator computes, in plain torch; see `fake_quantize_backward`."""
    s = s.to(torch.promote_types(x.dtype, torch.float32)).unsqueeze(-1)
    upper = group(grad.to(s.dtype), s.squeeze(-1))
    u, z = group(x.to(s.dtype), s.squeeze(-1)) / s, None
    low: Tensor | float = grid.low
    high: Tensor | float = grid.high
    if zero_point is not None:
        assert isinstance(grid, IntGrid)
        z = served_zero(zero_point, zero_step, grid).to(s.dtype).unsqueeze(-1)
        low, high = low - z, high - z
    rounded = Rounded(
        u, snap(u, grid, z), low, high, grid.outer, isinstance(grid, IntGrid), grid.high, grid.reach, elements
    )
    dx, ds, dz = estimator.gradients(upper, rounded)
    steps = [
        (d.sum(-1) * s.squeeze(-1)).to(torch.float32) if want and d is not None else None  # d/dlog s = s d/ds
        for d, want in zip((ds, dz), wanted[1:], strict=True)
    ]
    if strength is not None:  # of x + strength (Q(x) - x)
        dx = dx * strength + upper * (1 - strength)
        steps = [None if d is None else d * strength for d in steps]
    dx = dx.reshape(x.shape).to(x.dtype).contiguous() if wanted[0] else x.new_empty(0)
    if dx.untyped_storage().data_ptr() == grad.untyped_storage().data_ptr():
        dx = dx.clone()  # an operator's results are its own
    dlog, dzero = (s.new_empty(0, dtype=torch.float32) if d is None else d for d in steps)
    return dx, dlog, dzero


@torch.library.custom_op("qat::fake_quantize_backward", mutates_args=())
def _backward(
    grad: Tensor,
    x: Tensor,
    s: Tensor,
    zero_point: Tensor | None,
    zero_step: Tensor | None,
    strength: Tensor | None,
    grid: str,
    estimator: str,
    elements: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    levels, rule = grid_of(grid), interned(estimator)
    mask = fused_mask(rule, x.numel() // max(s.numel(), 1), any(wanted[1:]))
    if mask is not None and fused(x.device.type, x.dtype, levels, strength is not None):
        from qat.kernels.triton.fake_quant_backward import fake_quantize_backward as twin

        factor = (elements * levels.high) ** -0.5 if getattr(rule, "scale_gradient", False) else 1.0
        return twin(grad, x, s, zero_point, zero_step, levels, mask, factor, wanted)
    return backward_reference(grad, x, s, zero_point, zero_step, strength, levels, rule, elements, wanted)


@_backward.register_fake
def _(grad, x, s, zero_point, zero_step, strength, grid, estimator, elements, wanted):
    dx = x.new_empty(x.shape if wanted[0] else 0)
    return dx, *(s.new_empty(s.shape if want else 0, dtype=torch.float32) for want in wanted[1:])


def fake_quantize_backward(
    grad: Tensor,
    x: Tensor,
    s: Tensor,
    grid: str,
    estimator: str,
    elements: int,
    wanted: tuple[bool, bool, bool],
    *,
    zero_point: Tensor | None = None,
    zero_step: Tensor | None = None,
    strength: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients for x, log s and z, those that are wanted.

    Args:
        grad: Of the result.
        x: What was rounded.
        s: The scale that it was rounded with, fp32.
        grid: Name of the levels.
        estimator: Name of the estimator, interned; it learns what is wanted of it.
        elements: Those that share a scale, as LSQ counts them.
        wanted: Of x, log s and z.
        zero_point: The observed zero point.
        zero_step: What is learned of it.
        strength: See `fake_quantize`.
    """
    found = _backward(grad, x, s, zero_point, zero_step, strength, grid, estimator, elements, list(wanted))
    dx, dlog, dzero = (d if want else None for d, want in zip(found, wanted, strict=True))
    return dx, dlog, dzero
