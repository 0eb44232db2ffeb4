"""GPTQ's solver for one weight (Frantar et al., arXiv:2210.17323, algorithm 1): a pure function of weight and Hessian.

Legend: O out-features, I in-features, T tokens. Everything is computed in fp32, or in fp64 if the weight is; the
factors always in fp64.
"""

import math
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from qat.kernels.gptq_columns import round_block
from qat.kernels.gram import add_product, add_product_of_difference
from qat.nn.observers.base import Observer
from qat.numerics.affine import divisor, group, served
from qat.numerics.granularity import PerGroup
from qat.numerics.levels import code_dtype
from qat.numerics.qtensor import QuantizedTensor, as_g_idx
from qat.numerics.scheme import Scheme

MAX_DAMPING = 1.0
NOT_FINITE = "the Hessian is not finite, or not one of real inputs"

Order = Literal["none", "static", "group", "dynamic"]
Groups = Literal["static", "current", "stale"]


def check(act_order: str, groups: str, **numbers: float) -> None:
    """Raises ValueError if there are no such words, they do not go together, or a number is out of its range.

    Args:
        act_order: As `qat.ptq.gptq.gptq` has it.
        groups: Likewise.
        numbers: `damping` and `asymmetry`, finite and 0 or larger; `block_size`, 1 or larger.
    """
    for name, number in numbers.items():
        least = 1 if name == "block_size" else 0
        if not least <= number < math.inf:
            raise ValueError(f"{name}={number}: a finite number, {least} or larger")
    for name, value, known in (("act_order", act_order, Order), ("groups", groups, Groups)):
        if value not in get_args(known):
            raise ValueError(f"{name}={value}: one of {', '.join(get_args(known))}")
    if act_order == "static" and groups != "static":
        raise ValueError(
            f"groups={groups}: with act_order=static the columns of a group are taken at different times; "
            f"use act_order=group, which takes whole groups, act_order=dynamic, which makes them in that order, or none"
        )


def accumulate_hessian(hessian: Tensor, x_TI: Tensor) -> None:
    """Adds 2 x^T x in place (equation 1; its scale cancels in everything but the logged loss)."""
    add_product(hessian, x_TI, x_TI, 2.0)


def accumulate_cross(cross: Tensor, full_TI: Tensor, x_TI: Tensor) -> None:
    """Adds 2 (x_full - x)^T x in place: how inputs differ from those of the full-precision model (GPTAQ)."""
    add_product_of_difference(cross, full_TI, x_TI, x_TI, 2.0)


def quantize_weight(
    weight_OI: Tensor,
    hessian_II: Tensor,
    scheme: Scheme,
    *,
    observer: Observer,
    act_order: Order = "static",
    groups: Groups = "static",
    damping: float = 0.01,
    block_size: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    cross_II: Tensor | None = None,
    asymmetry: float = 0.0,
) -> tuple[QuantizedTensor, dict[str, Any]]:
    """Codes that keep `tr(dW H dW^T)` small, for one weight; arguments as those of `qat.ptq.gptq.gptq`.

    Args:
        weight_OI: The weight.
        hessian_II: See `accumulate_hessian`.
        scheme: The grid.
        observer: Finds ranges.
        act_order: The order of the columns.
        groups: On which weights the ranges of groups are found.
        damping: Fraction of the mean of the Hessian's diagonal.
        block_size: Columns between two updates of the rest.
        dtype: Storage dtype of the scales.
        cross_II: See `accumulate_cross`; of use only with `asymmetry`.
        asymmetry: How much of the difference of inputs is made up for; 0 for none.

    Returns:
        The quantized weight, and `{"loss": 1/2 tr(dW H dW^T) over the damped H, "damping", "fallback"}`;
        with `asymmetry`, dW is the distance from the weight that makes up for it.
    """
    tensor, losses_O, row = quantize_rows(
        weight_OI, hessian_II, scheme, observer=observer, act_order=act_order, groups=groups, damping=damping,
        block_size=block_size, dtype=dtype, cross_II=cross_II, asymmetry=asymmetry
    )  # fmt: skip
    return tensor, {"loss": float(losses_O.sum()), **row}


def quantize_rows(
    weight_OI: Tensor,
    hessian_II: Tensor,
    scheme: Scheme,
    *,
    observer: Observer,
    act_order: Order,
    groups: Groups,
    damping: float,
    block_size: int,
    dtype: torch.dtype,
    cross_II: Tensor | None,
    asymmetry: float,
) -> tuple[QuantizedTensor, Tensor, dict[str, Any]]:
    """`quantize_weight`, with the loss of each row (fp64 `[O]`) beside `{"damping", "fallback"}`.

    Raises:
        ValueError: See `check`; or the weight is not finite, or what is handed from column to column stops being so.
    """
    check(act_order, groups, damping=damping, block_size=block_size, asymmetry=asymmetry)
    weight = weight_OI.to(torch.promote_types(weight_OI.dtype, torch.float32))
    g = divisor((weight,), scheme)  # of all rows: stacked linears share it
    width, size = weight.shape[1], weight.shape[1]
    if isinstance(scheme.granularity, PerGroup):
        size = scheme.granularity.group_size
    order = column_order(hessian_II.diagonal(), act_order, size).to(weight.device)
    factor, used, failure = inverse_factor(hessian_II[order][:, order], damping)
    if factor is None:
        factor = torch.eye(width, device=weight.device)  # no compensation: round to nearest
    factor, rest = factor.to(weight.dtype), weight[:, order].clone()
    if cross_II is not None and asymmetry and failure is None:
        rest = rest + asymmetry * rest @ unequal(cross_II[order][:, order], factor)
    found: dict[int, tuple[Tensor, Tensor | None]] = {}
    dynamic = act_order == "dynamic"
    members = torch.arange(width, device=order.device) if dynamic else order  # group of each column, times `size`
    places = [] if groups == "static" else members.tolist()  # a GPU's host waits for them
    s_OI, z_OI = torch.empty_like(rest), None if scheme.symmetric else torch.empty_like(rest)

    def find(index: int, part: Tensor, place: Tensor | slice) -> None:
        """Ranges of group `index`, or of all of them, whose columns are at these places in the order."""
        scale, zero = found[index] = observer.qparams(part, scheme, dtype, g)
        s_OI[:, place] = spread(served(scale, g), part)
        if z_OI is not None and zero is not None:
            z_OI[:, place] = spread(zero, part)

    if groups == "static":
        find(0, weight[:, order] if dynamic else weight, members.argsort())
    codes = torch.empty(weight.shape, dtype=code_dtype(scheme.grid), device=weight.device)
    losses = torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    for now in blocks(width, block_size, size if groups == "current" else None):
        for begin in [] if groups == "static" else range(-(-now.start // size) * size, now.stop, size):
            group_now = slice(begin, begin + size)  # it may go on behind this block
            find(places[begin] // size, rest[:, group_now], group_now)
        zeros = None if z_OI is None else z_OI[:, now]
        codes[:, now], errors = round_block(rest[:, now], s_OI[:, now], zeros, factor[now, now], scheme.grid)
        rest[:, now.stop :].addmm_(errors, factor[now, now.stop :], alpha=-1.0)
        losses += errors.double().square().sum(1) / 2
    if not bool(torch.isfinite(losses).all()):
        raise ValueError(f"GPTQ's corrections grew beyond {weight.dtype} at damping {used}; raise damping")
    restored = torch.empty_like(codes)
    restored[:, order] = codes
    scale, zero_point = joined([found[index] for index in sorted(found)])
    g_idx = as_g_idx(order.argsort() // size, width // size) if dynamic else None
    tensor = QuantizedTensor(restored, scale, zero_point, scheme, tuple(weight.shape), g, g_idx)
    return tensor, losses, {"damping": used, "fallback": failure}


def spread(values: Tensor, like: Tensor) -> Tensor:
    """A value for each element of a weight, in its dtype."""
    return values.to(like.dtype).unsqueeze(-1).expand(group(like, values).shape).reshape(like.shape)


def joined(parts: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor | None]:
    """Scales and zero points of groups beside each other."""
    if len(parts) == 1:
        return parts[0]
    zeros = [zero for _, zero in parts if zero is not None]
    return torch.cat([scale for scale, _ in parts], 1), torch.cat(zeros, 1) if zeros else None


def column_order(diagonal_I: Tensor, act_order: Order, size: int) -> Tensor:
    """Places of the columns in the order in which they are taken.

    `static` goes by activation energy; `group`, as GPTQModel's group-aware order, by the largest energy of a group and,
    in a group, by energy: the columns of a group stay together. Neither needs a `g_idx` in the file. `dynamic` takes
    them as `static` does, and groups are of columns that are taken one after the other.
    """
    if act_order == "none":
        return torch.arange(len(diagonal_I))
    if act_order in ("static", "dynamic"):
        return diagonal_I.argsort(descending=True, stable=True)
    energy = diagonal_I.reshape(-1, size)
    within = energy.argsort(dim=1, descending=True, stable=True)
    first = torch.arange(len(energy), device=energy.device)[:, None] * size
    return (within + first)[energy.amax(1).argsort(descending=True, stable=True)].flatten()


def blocks(width: int, block_size: int, size: int | None) -> Iterator[slice]:
    """Columns of each block; none reaches over the beginning of a group of `size`, if there is one."""
    begin = 0
    while begin < width:
        stop = min(begin + block_size, width, width if size is None else (begin // size + 1) * size)
        yield slice(begin, stop)
        begin = stop


def unequal(cross_II: Tensor, factor_II: Tensor) -> Tensor:
    """What each column must hand to those after it, since its input is not the full-precision model's.

    `P = triu(dX X^T U^T, 1) U` of GPTAQ (Li et al., arXiv:2504.02692), U the factor of the inverse Hessian. Of W P,
    which is added before anything is rounded: so codes do not depend on the block size; the paper's code takes the
    values at hand for W in the loop, and rounded ones behind it.
    """
    return torch.triu(cross_II.to(factor_II.dtype) @ factor_II.T, 1) @ factor_II


def inverse_factor(hessian_II: Tensor, damping: float) -> tuple[Tensor | None, float, str | None]:
    """Upper Cholesky factor of the inverse of the damped Hessian (fp64), and the damping it took.

    A zero Hessian has none: every rounding would be as good, so it is not worth one that looks as if it were solved.

    Returns:
        (factor, damping, None), or (None, damping, why) where even the largest damping gives no factor.
    """
    diagonal = hessian_II.diagonal().double()
    mean = diagonal.mean()
    if not bool(mean > 0) or not bool(torch.isfinite(hessian_II).all()):
        return None, damping, "the Hessian is zero: calibration never excites it" if mean == 0 else NOT_FINITE
    diagonal = diagonal + (diagonal == 0).double() * mean
    used = damping
    while True:  # of a large matrix a copy in fp64 takes gigabytes: none lives longer than it has to
        damped = hessian_II.to(torch.float64, copy=True)
        damped.diagonal().copy_(diagonal + used * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        del damped
        if int(info) == 0:
            inverse = torch.cholesky_inverse(lower)
            del lower
            upper, info = torch.linalg.cholesky_ex(inverse, upper=True)
            del inverse
            if int(info) == 0 and bool(torch.isfinite(upper).all()):
                return upper, used, None
            del upper
        if used >= MAX_DAMPING:
            return None, used, f"the Hessian has no Cholesky factor at damping {used}"
        used = min(max(used, 1e-3) * 10, MAX_DAMPING)
