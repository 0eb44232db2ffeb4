"""GPTQ (Frantar et al., arXiv:2210.17323): round a weight column by column, and let the rest make up for the error.

Deviations from the paper, all of them common since: by default scales of all groups come from the original weight
before any column is rounded (`groups=static`), so that columns can be taken in the order of activation energy and the
file needs no `g_idx` (`act_order=dynamic` has one); factors are computed in fp64; an in-feature that calibration never
excites keeps its weight (the paper's code zeroes it) and is rounded to nearest.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat.kernels.gptq_columns import forget
from qat.models.families import structure_of
from qat.nn.observers.base import Observer
from qat.numerics.granularity import PerTensor
from qat.numerics.qtensor import QuantizedTensor
from qat.numerics.recipe import Recipe
from qat.numerics.scheme import Scheme
from qat.ptq.base import OUTSIDE, listening, nearest, outside, rows, targets
from qat.ptq.gptq_solver import Groups, Order, accumulate_cross, accumulate_hessian, check, quantize_rows
from qat.surgery.convert import apply
from qat.surgery.match import match
from qat.surgery.walk import Block, Changes, walk


class _Heard(Exception):
    """Nothing went wrong: what a block goes on to do with the inputs of a stage is not needed."""


@torch.no_grad()
def gptq(
    model: PreTrainedModel,
    recipe: Recipe,
    batches: list[Tensor],
    *,
    observer: Observer,
    act_order: Order = "static",
    groups: Groups = "static",
    damping: float = 0.01,
    block_size: int = 128,
    asymmetry: float = 0.0,
    dtype: torch.dtype = torch.bfloat16,
    store: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    device: str | None = None,
) -> Changes:
    """Quantizes block by block, true-sequentially: every linear sees inputs that its quantized predecessors computed.

    Embeddings, and heads that are not tied to one, lie outside of the blocks: they are rounded to nearest.

    Args:
        model: A causal language model of a family that `models.families` knows; left as it is.
        recipe: Module name to scheme.
        batches: Calibration token ids, `[B, T]` each, without padding.
        observer: Finds the range of every group.
        act_order: `static`: columns go in descending order of activation energy; `group`: groups do, and columns in
            each, as GPTQModel has it; `none`: from left to right; `dynamic`: as `static`, and groups are formed in that
            order, so that each tensor has a `g_idx`, which GPTQ's layout and compressed-tensors' pack-quantized carry.
            With `static` ranges it is llm-compressor's `actorder=group`, with `stale` ones AutoGPTQ's desc_act.
        groups: On which weights the range of a group is found: `static`, the original ones; `current`, those at hand
            when its first column is rounded, as the paper says; `stale`, those at hand when the block of its first
            column begins, as the paper's code and GPTQModel have it (codes then depend on `block_size`).
        damping: Fraction of the mean of the Hessian's diagonal that is added to it (section 3.3); multiplied by ten, up
            to 1, while the Hessian has no Cholesky factor.
        block_size: Columns between two updates of the rest of the matrix; changes speed, not codes.
        asymmetry: How much of what earlier rounding did to the inputs is made up for (GPTAQ, arXiv:2504.02692; its code
            has 0.25), 0 for none; it takes a second stream of activations, the full-precision blocks'. Both begin with
            what embeddings serve, so what a quantized embedding did is not made up for.
        dtype: Storage dtype of the scales.
        store: See `walk`.
        progress: See `walk`.
        device: Where one block at a time is worked on; None: where the model is, which may stay on the CPU.

    Returns:
        Changes; `layers` has a row for each linear with `loss`, `damping`, `seconds` and `fallback` (why
        it was rounded to nearest instead, or None).

    Raises:
        ValueError: The family is not known, the recipe does not fit, activations are not finite, a number is out of its
            range, or `groups` needs columns that `act_order` takes apart.
    """
    check(act_order, groups, damping=damping, block_size=block_size, asymmetry=asymmetry)
    plan, structure = match(model, recipe), structure_of(model.config.model_type)
    knobs = {"observer": observer, "act_order": act_order, "groups": groups, "damping": damping,
             "block_size": block_size, "dtype": dtype, "asymmetry": asymmetry}  # fmt: skip

    def visit(block: Block) -> Changes:
        changes, schemes = Changes(), targets(block, plan)
        if strays := set(schemes) - {name for stage in structure.stages for name in stage}:
            raise ValueError(f"{block.name}.{sorted(strays)[0]}: GPTQ does not know where its input comes from")
        for stage in structure.stages:
            names = [name for name in stage if name in schemes]
            if names:
                changes.add(_quantize_stage(block, names, schemes, knobs))
        return changes

    rounded = nearest(model, outside(plan, structure.blocks), observer, dtype, OUTSIDE, device)
    seen = apply(model, rounded.tensors, {})  # the first block, too, sees what is served: a quantized embedding
    full: Literal["inputs", False] = "inputs" if asymmetry else False
    changes = walk(seen, batches, structure.blocks, visit, True, recipe, store, progress, full, device=device)
    changes.add(rounded)
    forget()
    return changes


def _quantize_stage(block: Block, names: list[str], schemes: dict[str, Scheme], knobs: dict[str, Any]) -> Changes:
    start = time.monotonic()
    linears = {name: block.module.get_submodule(name) for name in names}
    first = linears[names[0]]
    assert isinstance(first, nn.Linear)
    hessian = torch.zeros(first.in_features, first.in_features, device=first.weight.device)
    cross = torch.zeros_like(hessian) if knobs["asymmetry"] else None
    for x, full in _inputs(block, names[0], cross is not None):
        accumulate_hessian(hessian, x)
        if cross is not None and full is not None:
            accumulate_cross(cross, full, x)
    if not all(bool(torch.isfinite(sums).all()) for sums in (hessian, cross) if sums is not None):
        raise ValueError(f"{block.name}.{names[0]}: not finite on the calibration data: its inputs, or their products")
    changes = Changes()
    for together in _stacks(names, schemes):
        weights: list[Tensor] = [linears[name].get_parameter("weight") for name in together]
        sizes = [len(weight) for weight in weights]
        stacked, scheme = torch.cat(weights).float(), schemes[together[0]]
        try:
            tensor, losses_O, row = quantize_rows(stacked, hessian, scheme, **knobs, cross_II=cross)
        except ValueError as error:
            raise ValueError(f"{', '.join(f'{block.name}.{name}' for name in together)}: {error}") from None
        parts = [tensor] if len(together) == 1 else _split(tensor, sizes)
        for name, weight, part, losses in zip(together, weights, parts, losses_O.split(sizes), strict=True):
            weight.copy_(part.dequantize(weight.dtype))
            changes.tensors[f"{block.name}.{name}"] = part
            seconds = (time.monotonic() - start) / len(together)
            loss = float(losses.sum())
            changes.layers.append({"name": f"{block.name}.{name}", "loss": loss, **row, "seconds": seconds})
        start = time.monotonic()
    return changes


def _inputs(block: Block, name: str, both: bool) -> Iterator[tuple[Tensor, Tensor | None]]:
    """What a linear gets, batch by batch, `[T, I]`; and, if asked for, what it gets in the full-precision model."""
    heard: list[Tensor] = []

    def hear(args: tuple[Any, ...], _: dict[str, Any]) -> None:
        heard.append(rows(args[0]))
        raise _Heard

    with ExitStack() as stack:
        for module in [block.module, block.original] if both else [block.module]:
            stack.enter_context(listening(module.get_submodule(name), hear))
        for index in range(len(block.inputs)):
            with suppress(_Heard):
                block.output(index)
            if both:
                with suppress(_Heard):
                    block.output(index, block.original, block.full)
            if len(heard) == (2 if both else 1):  # none of a linear that no token reaches
                yield heard[0], heard[1] if both else None
            heard.clear()


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
            None if tensor.g_idx is None else tensor.g_idx.clone(),
        )
        for codes, scale, zero in parts
    ]
