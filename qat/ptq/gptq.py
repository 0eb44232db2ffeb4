"""GPTQ (Frantar et al., arXiv:2210.17323): round a weight column by column, and let the rest make up for the error.

Legend: O out-features, I in-features, T tokens. Deviations from the paper, all of them common since: scales of all
groups come from the original weight before any column is rounded ("static groups"), so that columns can be taken in the
order of activation energy and the file needs no `g_idx`; factors are computed in fp64; an in-feature that calibration
never excites keeps its weight (the paper's code zeroes it) and is rounded to nearest.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat.kernels.gptq_columns import forget, round_block
from qat.models.families import structure_of
from qat.nn.observers.base import Observer
from qat.numerics.affine import divisor, group, served
from qat.numerics.granularity import PerTensor
from qat.numerics.levels import code_dtype
from qat.numerics.qtensor import QuantizedTensor
from qat.numerics.recipe import Recipe
from qat.numerics.scheme import Scheme
from qat.ptq.base import OUTSIDE, listening, nearest, outside, rows, targets
from qat.surgery.convert import apply
from qat.surgery.match import match
from qat.surgery.walk import Block, Changes, walk

MAX_DAMPING = 1.0


class _Heard(Exception):
    """Nothing went wrong: what a block goes on to do with the inputs of a stage is not needed."""


@torch.no_grad()
def gptq(
    model: PreTrainedModel,
    recipe: Recipe,
    batches: list[Tensor],
    *,
    observer: Observer,
    act_order: bool = True,
    damping: float = 0.01,
    block_size: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    store: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Changes:
    """Quantizes block by block, true-sequentially: every linear sees inputs that its quantized predecessors computed.

    Embeddings, and heads that are not tied to one, lie outside of the blocks: they are rounded to nearest.

    Args:
        model: A causal language model of a family that `models.families` knows; left as it is.
        recipe: Module name to scheme.
        batches: Calibration token ids, `[B, T]` each, without padding.
        observer: Finds the range of every group, on the original weight.
        act_order: Whether columns go in descending order of activation energy.
        damping: Fraction of the mean of the Hessian's diagonal that is added to it (section 3.3); multiplied by ten, up
            to 1, while the Hessian has no Cholesky factor.
        block_size: Columns between two updates of the rest of the matrix; changes speed, not codes.
        dtype: Storage dtype of the scales.
        store: See `walk`.
        progress: See `walk`.

    Returns:
        Changes; `layers` has a row for each linear with `loss`, `damping`, `seconds` and `fallback` (the reason why it
        was rounded to nearest instead, or None).

    Raises:
        ValueError: The family is not known, the recipe does not fit, or activations are not finite.
    """
    plan, structure = match(model, recipe), structure_of(model.config.model_type)
    knobs = {"observer": observer, "act_order": act_order, "damping": damping, "block_size": block_size, "dtype": dtype}

    def visit(block: Block) -> Changes:
        changes, schemes = Changes(), targets(block, plan)
        if strays := set(schemes) - {name for stage in structure.stages for name in stage}:
            raise ValueError(f"{block.name}.{sorted(strays)[0]}: GPTQ does not know where its input comes from")
        for stage in structure.stages:
            names = [name for name in stage if name in schemes]
            if names:
                changes.add(_quantize_stage(block, names, schemes, knobs))
        return changes

    rounded = nearest(model, outside(plan, structure.blocks), observer, dtype, OUTSIDE)
    seen = apply(model, rounded.tensors, {})  # the first block, too, sees what is served: a quantized embedding
    changes = walk(seen, batches, structure.blocks, visit, True, recipe, store, progress)
    changes.add(rounded)
    forget()
    return changes


def _quantize_stage(block: Block, names: list[str], schemes: dict[str, Scheme], knobs: dict[str, Any]) -> Changes:
    start = time.monotonic()
    linears = {name: block.module.get_submodule(name) for name in names}
    first = linears[names[0]]
    assert isinstance(first, nn.Linear)
    hessian = torch.zeros(first.in_features, first.in_features, device=first.weight.device)

    def hear(args: tuple[Any, ...], _: dict[str, Any]) -> None:
        accumulate_hessian(hessian, rows(args[0]))
        raise _Heard

    with listening(first, hear):
        for index in range(len(block.inputs)):
            with suppress(_Heard):
                block.output(index)
    if not bool(torch.isfinite(hessian).all()):
        raise ValueError(f"{block.name}.{names[0]}: its inputs are not finite on the calibration data")
    changes = Changes()
    for together in _stacks(names, schemes):
        weights: list[Tensor] = [linears[name].get_parameter("weight") for name in together]
        sizes = [len(weight) for weight in weights]
        tensor, losses_O, row = quantize_rows(torch.cat(weights).float(), hessian, schemes[together[0]], **knobs)
        parts = [tensor] if len(together) == 1 else _split(tensor, sizes)
        for name, weight, part, losses in zip(together, weights, parts, losses_O.split(sizes), strict=True):
            weight.copy_(part.dequantize(weight.dtype))
            changes.tensors[f"{block.name}.{name}"] = part
            seconds = (time.monotonic() - start) / len(together)
            loss = float(losses.sum())
            changes.layers.append({"name": f"{block.name}.{name}", "loss": loss, **row, "seconds": seconds})
        start = time.monotonic()
    return changes


def _stacks(names: list[str], schemes: dict[str, Scheme]) -> list[list[str]]:
    """Linears that are solved as one, row upon row: they share input and scheme, and rows do not know of each other."""
    stacks: dict[Any, list[str]] = {}
    for name in names:
        alone = isinstance(schemes[name].granularity, PerTensor)  # its rows share a scale
        stacks.setdefault((schemes[name], name if alone else None), []).append(name)
    return list(stacks.values())


def _split(tensor: QuantizedTensor, sizes: list[int]) -> list[QuantizedTensor]:
    """A stack of rows, apart again."""
    zeros = [None] * len(sizes) if tensor.zero_point is None else tensor.zero_point.split(sizes)
    parts = zip(tensor.codes.split(sizes), tensor.scale.split(sizes), zeros, strict=True)
    return [
        QuantizedTensor(
            codes.clone(),
            scale.clone(),
            zero if zero is None else zero.clone(),
            tensor.scheme,
            (*codes.shape,),
            None if tensor.global_scale is None else tensor.global_scale.clone(),
        )
        for codes, scale, zero in parts
    ]


def accumulate_hessian(hessian: Tensor, x_TI: Tensor) -> None:
    """Adds 2 x^T x in fp32, in place (equation 1; its scale cancels in everything but the logged loss)."""
    x = x_TI.float()
    hessian.addmm_(x.T, x, alpha=2.0)


def quantize_weight(
    weight_OI: Tensor,
    hessian_II: Tensor,
    scheme: Scheme,
    *,
    observer: Observer,
    act_order: bool = True,
    damping: float = 0.01,
    block_size: int = 128,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[QuantizedTensor, dict[str, Any]]:
    """Codes that keep `tr(dW H dW^T)` small, for one weight; a pure function of its arguments.

    Returns:
        The quantized weight, and `{"loss": 1/2 tr(dW H dW^T) over the damped H, "damping", "fallback"}`.
    """
    knobs: dict[str, Any] = {"observer": observer, "act_order": act_order, "damping": damping}
    tensor, losses_O, row = quantize_rows(weight_OI, hessian_II, scheme, **knobs, block_size=block_size, dtype=dtype)
    return tensor, {"loss": float(losses_O.sum()), **row}


def quantize_rows(
    weight_OI: Tensor,
    hessian_II: Tensor,
    scheme: Scheme,
    *,
    observer: Observer,
    act_order: bool,
    damping: float,
    block_size: int,
    dtype: torch.dtype,
) -> tuple[QuantizedTensor, Tensor, dict[str, Any]]:
    """`quantize_weight`, with the loss of each row (fp64 `[O]`) beside `{"damping", "fallback"}`."""
    weight = weight_OI.float()
    g = divisor((weight,), scheme)  # of all rows: stacked linears share it
    scale, zero_point = observer.qparams(weight, scheme, dtype, g)
    width = weight.shape[1]
    order = hessian_II.diagonal().argsort(descending=True, stable=True) if act_order else torch.arange(width)
    order = order.to(weight.device)
    factor, used, failure = inverse_factor(hessian_II[order][:, order], damping)
    if factor is None:
        factor = torch.eye(width, device=weight.device)  # no compensation: round to nearest

    def spread(values: Tensor) -> Tensor:  # a value for each element, columns in the order in which they are taken
        return values.float().unsqueeze(-1).expand(group(weight, values).shape).reshape(weight.shape)[:, order]

    s, z = spread(served(scale, g)), None if zero_point is None else spread(zero_point)
    codes = torch.empty(weight.shape, dtype=code_dtype(scheme.grid), device=weight.device)
    rest, losses = weight[:, order].clone(), torch.zeros(len(weight), dtype=torch.float64, device=weight.device)
    for begin in range(0, width, block_size):
        now = slice(begin, min(begin + block_size, width))
        zeros = None if z is None else z[:, now]
        codes[:, now], errors = round_block(rest[:, now], s[:, now], zeros, factor[now, now], scheme.grid)
        rest[:, now.stop :].addmm_(errors, factor[now, now.stop :], alpha=-1.0)
        losses += errors.double().square().sum(1) / 2
    restored = torch.empty_like(codes)
    restored[:, order] = codes
    tensor = QuantizedTensor(restored, scale, zero_point, scheme, tuple(weight.shape), g)
    return tensor, losses, {"damping": used, "fallback": failure}


def inverse_factor(hessian_II: Tensor, damping: float) -> tuple[Tensor | None, float, str | None]:
    """Upper Cholesky factor of the inverse of the damped Hessian (fp32, computed in fp64), and the damping it took.

    Returns:
        (factor, damping, None), or (None, damping, why) where even the largest damping gives no factor.
    """
    hessian = hessian_II.double()
    mean = hessian.diagonal().mean()
    dead = hessian.diagonal() == 0
    hessian = hessian + torch.diag(dead.double() * (mean if mean > 0 else 1.0))
    used = damping
    while True:
        damped = hessian + torch.eye(len(hessian), dtype=torch.float64, device=hessian.device) * (used * mean)
        lower, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0:
            upper, info = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if int(info) == 0 and bool(torch.isfinite(upper).all()):
                return upper.float(), used, None
        if used >= MAX_DAMPING:
            return None, used, f"the Hessian has no Cholesky factor at damping {used}"
        used = min(max(used, 1e-3) * 10, MAX_DAMPING)
