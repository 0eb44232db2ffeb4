"""SmoothQuant (Xiao et al., arXiv:2211.10438): move what is hard to quantize from activations into weights.

Legend: I in-features of the linears behind one norm. Channel j of their input is divided by `s_j = max|X_j|^a /
max|W_j|^(1-a)` (equation 4), which the norm absorbs, and the columns of the linears are multiplied by it. Deviations
from the paper's code: one `a` for the model is searched on the calibration data, the identity among the candidates, so
the model ends no worse there than rounded to nearest without it; the scale is taken that the norm's *rounded* weight
absorbs, so folding is exact in what is stored; linears behind a norm are smoothed only if all of them are quantized.
"""

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat.models.families import structure_of
from qat.models.structure import Smoothing, Structure
from qat.nn.kv import quantize_kv
from qat.nn.observers.base import Observer
from qat.numerics.metrics import kl
from qat.numerics.recipe import Recipe
from qat.ptq.base import Method, listening, nearest, onwards, rows, targets
from qat.surgery.calibrate import calibrate, check_batches
from qat.surgery.convert import apply, quantize_inputs
from qat.surgery.fold import absorbed, fold, foldable
from qat.surgery.match import Plan, match
from qat.surgery.walk import Block, Changes

Scales = dict[str, Tensor]  # a norm's name to what it is divided by, `[I]`


@torch.no_grad()
def smoothquant(
    model: PreTrainedModel,
    recipe: Recipe,
    batches: list[Tensor],
    *,
    observer: Observer,
    input_observer: Observer | None = None,
    alphas: Sequence[float] = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9),
    then: Method | None = None,
    dtype: torch.dtype = torch.bfloat16,
    store: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Changes:
    """Smooths with the migration strength that serves best, and rounds.

    A candidate is judged by KL(full precision || served) on the calibration tokens, where served means: weights rounded
    to nearest on the observer's ranges, inputs, keys and values fake-quantized as the recipe says, static ranges of
    inputs calibrated. `then` rounds what was found; the search does not know it.

    Args:
        model: A causal language model of a family that `models.families` knows; left as it is.
        recipe: Module name to scheme.
        batches: Calibration token ids, `[B, T]` each, without padding.
        observer: Finds ranges of weights.
        input_observer: Finds static ranges of inputs, in the search; None: their extremes.
        alphas: Migration strengths in [0, 1] that are tried beside the identity: 1 moves all into the weights.
        then: The method that rounds the smoothed model; None: to nearest.
        dtype: Storage dtype of scales and folded tensors.
        store: A directory that keeps the scales found, and what `then` keeps.
        progress: See `walk`; for `then`.

    Returns:
        Changes; `layers` has a row with `loss`, `identity` (that of no smoothing), `alpha` (None: the identity won),
        `fallback` (None) and `seconds`, and the rows of what rounds.

    Raises:
        ValueError: An alpha is outside of [0, 1], batches are none that calibrate, the family is not known, the recipe
            does not fit, or activations are not finite.
    """
    if strays := [alpha for alpha in alphas if not 0 <= alpha <= 1]:
        raise ValueError(f"alphas: {strays[0]}: a migration strength is from 0 (none) to 1 (all into the weights)")
    check_batches(batches)
    plan, structure = match(model, recipe), structure_of(model.config.model_type)
    kept = None if store is None else store / "smoothed.safetensors"
    if kept is not None and kept.exists():
        found = Changes.load(kept, recipe, next(model.parameters()).device)
    else:
        found = _search(model, recipe, plan, structure, batches, observer, input_observer, alphas, dtype)
        if kept is not None:
            kept.parent.mkdir(parents=True, exist_ok=True)
            found.save(kept)
    changes = Changes(layers=found.layers)
    moved = smoothed(model, plan, structure, found.folded, dtype)
    changes.add(onwards(model, recipe, batches, moved, then, observer, dtype, store, progress))
    return changes


def _search(
    model: PreTrainedModel,
    recipe: Recipe,
    plan: Plan,
    structure: Structure,
    batches: list[Tensor],
    observer: Observer,
    input_observer: Observer | None,
    alphas: Sequence[float],
    dtype: torch.dtype,
) -> Changes:
    """The best scales, by their norms' names in `folded`, and the row of the search."""
    start, largest = time.monotonic(), _largest(model, plan, structure, batches)

    def loss(scales: Scales) -> float:
        smooth = apply(model, {}, smoothed(model, plan, structure, scales, dtype))
        served = apply(smooth, nearest(smooth, plan.quantized, observer, dtype).tensors, {})
        quantize_kv(served, recipe.kv)
        quantize_inputs(served, recipe, {}, input_observer, dtype)
        calibrate(served, batches)
        return divergence(model, served, batches)

    candidates = [_scales(model, plan, structure, largest, alpha, dtype) for alpha in alphas]
    identity, *losses = (loss(scales) for scales in ({}, *candidates))
    if not math.isfinite(identity):
        raise ValueError("SmoothQuant: the model's logits, rounded to nearest, are not finite on the calibration data")
    best = min([identity, *losses])  # the identity, if no other is better
    assert best <= identity, "worse than round to nearest"
    alpha, scales = (None, {}) if best == identity else [*zip(alphas, candidates, strict=True)][losses.index(best)]
    row: dict[str, Any] = {"name": "smoothquant", "loss": best, "identity": identity, "alpha": alpha}
    return Changes(folded=scales, layers=[{**row, "fallback": None, "seconds": time.monotonic() - start}])


@torch.no_grad()
def smoothed(
    model: nn.Module, plan: Plan, structure: Structure, scales: Scales, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Parameter name to changed tensor: norms in the storage dtype, and fp32 weights that are still to be rounded."""
    moved: dict[str, Tensor] = {}
    for block, smoothing, weights in _mappings(model, plan, structure):
        if (s := scales.get(f"{block.name}.{smoothing.previous}")) is not None:
            moved |= fold(block, smoothing, weights, s, dtype, structure.offset)
            moved |= {f"{block.name}.{name}.weight": weights[name] for name in smoothing.linears}
    return moved


def _scales(
    model: nn.Module, plan: Plan, structure: Structure, largest: Scales, alpha: float, dtype: torch.dtype
) -> Scales:
    scales = {}
    for block, smoothing, weights in _mappings(model, plan, structure):
        name = f"{block.name}.{smoothing.previous}"
        columns = torch.cat([weights[linear] for linear in smoothing.linears]).abs().amax(0)
        wanted = largest[name].clamp(min=1e-5).pow(alpha) / columns.clamp(min=1e-5).pow(1 - alpha)
        scales[name] = absorbed(block, smoothing, wanted, dtype, structure.offset)
    return scales


def _largest(model: nn.Module, plan: Plan, structure: Structure, batches: list[Tensor]) -> Scales:
    """Norm's name to max |X_j| of what it hands to its linears."""
    found: Scales = {}

    def hear(name: str) -> Callable[[tuple[Any, ...], dict[str, Any]], None]:
        def listener(args: tuple[Any, ...], _: dict[str, Any]) -> None:
            x = rows(args[0]).float().abs().amax(0)
            found[name] = torch.maximum(found[name], x) if name in found else x

        return listener

    with ExitStack() as stack:
        for block, smoothing, _ in _mappings(model, plan, structure):
            linear = model.get_submodule(f"{block.name}.{smoothing.linears[0]}")
            stack.enter_context(listening(linear, hear(f"{block.name}.{smoothing.previous}")))
        for batch in batches:
            model(input_ids=batch.to(next(model.parameters()).device), use_cache=False)
    for name, x in found.items():
        if not bool(torch.isfinite(x).all()):
            raise ValueError(f"{name}: its outputs are not finite on the calibration data")
    return found


def _mappings(
    model: nn.Module, plan: Plan, structure: Structure
) -> Iterator[tuple[Block, Smoothing, dict[str, Tensor]]]:
    """Every norm whose linears are all quantized, in a copy of its block, with the fp32 weights of that."""
    layers = model.get_submodule(structure.blocks)
    assert isinstance(layers, nn.ModuleList)
    for index, layer in enumerate(layers):
        block = Block(f"{structure.blocks}.{index}", copy.deepcopy(layer), [], [], layer)
        weights = {name: _wide(layer.get_parameter(f"{name}.weight")) for name in targets(block, plan)}
        for smoothing in structure.smoothings:
            norm = not isinstance(layer.get_submodule(smoothing.previous), nn.Linear)
            if norm and foldable(block, smoothing, weights):
                yield block, smoothing, weights


def _wide(weight: Tensor) -> Tensor:
    return weight.to(torch.promote_types(weight.dtype, torch.float32), copy=True)


def divergence(model: PreTrainedModel, served: PreTrainedModel, batches: list[Tensor]) -> float:
    """Mean KL(model || served) over the tokens of all batches, nats."""
    total, tokens, device = [], 0, next(model.parameters()).device
    for batch in batches:
        ids = batch.to(device)
        full = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        own = served(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        total.append(kl(full, own).double().sum())
        tokens += len(own)
    return float(torch.stack(total).sum()) / tokens
