"""AWQ (Lin et al., arXiv:2306.00978): scale up the input channels that activations make important, then round.

Legend: O out-features, I in-features, T tokens. A scale s[I] multiplies the columns of some linears and divides the
output channels of what feeds them, so the function stays. Deviations from the paper's code: the identity is always a
candidate, so no mapping ends worse than round to nearest; where a norm absorbs 1/s, the scale is taken that the norm's
*rounded* weight absorbs, so folding is exact in what is stored; the value-to-output mapping is served under
grouped-query attention too, with scales shared by the heads that read one value head. `awq_clip.py` says its own.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat.kernels.gram import add_product
from qat.models.families import structure_of
from qat.models.structure import Smoothing
from qat.nn.observers.base import Observer
from qat.numerics.affine import divisor, qparams, quantize
from qat.numerics.qtensor import QuantizedTensor
from qat.numerics.recipe import Recipe
from qat.numerics.scheme import Scheme
from qat.ptq.awq_clip import clipped_range, clips
from qat.ptq.base import OUTSIDE, nearest, outside, rows, targets
from qat.surgery.fold import absorbed, fold, foldable
from qat.surgery.match import match
from qat.surgery.prepare import families
from qat.surgery.walk import Block, Changes, walk

Duo = bool | Literal["both"]
UNHEARD = "its inputs are zero on the calibration data"
KINDS: dict[Duo, tuple[bool, ...]] = {True: (True,), False: (False,), "both": (True, False)}


@torch.no_grad()
def awq(
    model: PreTrainedModel,
    recipe: Recipe,
    batches: list[Tensor],
    *,
    observer: Observer,
    grid: int = 20,
    duo_scaling: Duo = True,
    clip: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    store: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
    device: str | None = None,
) -> Changes:
    """Searches scales block by block on the full-precision stream, folds them, and rounds to nearest.

    Embeddings, and heads that are not tied to one, lie outside of the blocks: no scale is searched for them.

    Args:
        model: A causal language model of a family that `models.families` knows; left as it is.
        recipe: Module name to scheme.
        batches: Calibration token ids, `[B, T]` each, without padding.
        observer: Finds ranges of the scaled weights.
        grid: Ratios between 0 and 1, both included, that are tried beside the identity.
        duo_scaling: True: `s = x^r / w^(1-r)`, with the relative magnitude of weights as well; False: `s = x^r` (the
            paper); `both`: candidates of both kinds.
        clip: Whether ranges are then clipped to what keeps each group's output best; those of queries and keys are not.
        dtype: Storage dtype of scales and folded tensors.
        store: See `walk`.
        progress: See `walk`.
        device: Where one block at a time is worked on; None: where the model is, which may stay on the CPU.

    Returns:
        Changes; `layers` has a row for each mapping with `loss`, `identity` (the loss of round to nearest), `ratio` and
        `duo` (None: the identity won), `fallback` (that nothing reaches its linears, or None) and `seconds`; and one
        for each module outside of the blocks, with its `fallback`.

    Raises:
        ValueError: The family is not known, the recipe does not fit, activations are not finite, or `duo_scaling` or
            `grid` is out of its range.
    """
    if duo_scaling not in KINDS:
        raise ValueError(f"duo_scaling={duo_scaling!r}: one of true, false, both")
    if grid < 0:
        raise ValueError(f"grid={grid}: a number of ratios, 0 (the identity alone) or larger")
    plan, structure = match(model, recipe), structure_of(model.config.model_type)
    search, together = Search(observer, grid, duo_scaling, dtype, structure.offset), families(model, plan.quantized)

    def visit(block: Block) -> Changes:
        schemes, changes = targets(block, plan), Changes()
        weights = {name: block.module.get_parameter(f"{name}.weight").to(torch.float32, copy=True) for name in schemes}
        for part in dict.fromkeys(map(_part, schemes)):
            linears = [name for name in schemes if _part(name) == part]
            smoothings = [smoothing for smoothing in structure.smoothings if _part(smoothing.inspect) == part]
            inspected, clipped = [s.inspect for s in smoothings], [*filter(clips, linears)] if clip else []
            heard = Heard.of(block, linears, inspected, clipped)
            for smoothing in smoothings:
                if foldable(block, smoothing, weights):
                    row, scales = search.smooth(block, smoothing, schemes, weights, heard)
                    changes.layers.append(row)
                    if scales is not None:
                        changes.folded |= fold(block, smoothing, weights, scales, dtype, structure.offset)
                        heard.scale(smoothing.linears, scales)
            for name in linears:
                full, scheme = f"{block.name}.{name}", schemes[name]
                g = divisor((weights[n.removeprefix(f"{block.name}.")] for n in together[full]), scheme)
                changes.tensors[full] = _round(weights[name], scheme, observer, dtype, g, heard.grams.get(name))
            del heard  # before the next part's: what is kept of one is the most that this method keeps
        return changes

    changes = walk(model, batches, structure.blocks, visit, False, recipe, store, progress, device=device)
    changes.add(nearest(model, outside(plan, structure.blocks), observer, dtype, OUTSIDE, device))
    return changes


@dataclass
class Heard:
    """What one pass through a full-precision block says of a part of it.

    Attributes:
        x_mean: Linear to the mean |x| of its in-features, fp32 `[I]`.
        grams: Linear to x^T x / T, fp32 `[I, I]`, where asked for.
        calls: Inspected module to (args, kwargs, output) of each batch.
    """

    x_mean: dict[str, Tensor] = field(default_factory=dict)
    grams: dict[str, Tensor] = field(default_factory=dict)
    calls: dict[str, list[tuple[Any, Any, Tensor]]] = field(default_factory=dict)

    @staticmethod
    def of(block: Block, linears: list[str], inspected: list[str], grams: list[str]) -> "Heard":
        """Runs the block, as it was, on all of its inputs.

        Args:
            block: The block.
            linears: Linears whose inputs are heard.
            inspected: Modules whose calls are kept.
            grams: Linears whose Gram matrices are asked for.

        Raises:
            ValueError: A linear's input is not finite.
        """
        heard = Heard(_empty(block, linears, 1), _empty(block, grams, 2))
        counts, handles = dict.fromkeys(linears, 0), []

        def hear(name: str) -> Callable[..., None]:
            def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
                if name in inspected:
                    heard.calls.setdefault(name, []).append((args, kwargs, _first(output)))
                if name in counts:
                    x = rows(args[0]).float()
                    heard.x_mean[name] += x.abs().sum(0)
                    if name in grams:
                        add_product(heard.grams[name], rows(args[0]), rows(args[0]))
                    counts[name] += len(x)

            return hook

        for name in {*linears, *inspected}:
            handles.append(block.original.get_submodule(name).register_forward_hook(hear(name), with_kwargs=True))
        try:
            for index in range(len(block.inputs)):
                block.output(index, block.original)
        finally:
            for handle in handles:
                handle.remove()
        for name, count in counts.items():
            heard.x_mean[name] /= max(count, 1)  # 0 of a linear that no token reaches
            if name in grams:
                heard.grams[name] /= max(count, 1)
            if not bool(torch.isfinite(heard.x_mean[name]).all()):
                raise ValueError(f"{block.name}.{name}: its inputs are not finite on the calibration data")
        return heard

    def scale(self, linears: tuple[str, ...], scales_I: Tensor) -> None:
        """The same for inputs that are divided by scales."""
        for name in self.grams.keys() & set(linears):
            self.grams[name] = self.grams[name] / scales_I[:, None] / scales_I


@dataclass(frozen=True)
class Search:
    """The search for one mapping's scales; attributes as in `awq`."""

    observer: Observer
    grid: int
    duo_scaling: Duo
    dtype: torch.dtype
    offset: float

    def smooth(
        self,
        block: Block,
        smoothing: Smoothing,
        schemes: dict[str, Scheme],
        weights: dict[str, Tensor],
        heard: Heard,
    ) -> tuple[dict[str, Any], Tensor | None]:
        """The report row of a mapping, and the scales `[I]` to fold; None if the identity won."""
        start = time.monotonic()
        x_mean = heard.x_mean[smoothing.linears[0]]
        name = f"{block.name}.{smoothing.previous} -> {', '.join(smoothing.linears)}"
        if not bool(x_mean.any()):  # nothing reaches the linears: no rounding of theirs is an error
            row = {"name": name, "loss": 0.0, "identity": 0.0, "ratio": None, "duo": None, "fallback": UNHEARD}
            return {**row, "seconds": time.monotonic() - start}, None
        w_mean = relative_magnitude({name: weights[name] for name in smoothing.linears}, schemes)
        inspect, calls = block.module.get_submodule(smoothing.inspect), heard.calls.pop(smoothing.inspect)
        linears = {name: block.module.get_submodule(name) for name in smoothing.linears}

        def loss(scales: Tensor) -> Tensor:
            for name, linear in linears.items():
                scheme, like = schemes[name], (n for n in linears if schemes[n] == schemes[name])
                g = divisor((weights[n] * scales for n in like), scheme)
                rounded = _round(weights[name] * scales, scheme, self.observer, self.dtype, g, check=False)
                linear.weight.copy_(rounded.dequantize(torch.float32) / scales)  # type: ignore[operator]
            error = (_first(inspect(*args, **kwargs)).float().sub_(output) for args, kwargs, output in calls)
            return torch.stack([e.square_().sum(dtype=torch.float64) for e in error]).sum()

        ratios = [k / max(self.grid - 1, 1) for k in range(self.grid)]
        knobs: list[Any] = [(None, None), *((ratio, duo) for duo in KINDS[self.duo_scaling] for ratio in ratios)]
        tried = [torch.ones_like(x_mean)]  # the identity
        for ratio, duo in knobs[1:]:
            wanted = candidate(x_mean, w_mean, ratio, duo)
            tried.append(absorbed(block, smoothing, wanted, self.dtype, self.offset))
        sums = torch.stack([loss(scales) for scales in tried])
        losses = (sums / sum(output.numel() for _, _, output in calls)).tolist()  # a GPU's host waits once
        identity, best = losses[0], min(losses)  # the identity, if no other is better
        if not math.isfinite(identity):
            raise ValueError(f"{name}: rounded to nearest, its output is not finite on the calibration data")
        assert best <= identity, f"{name}: worse than round to nearest"
        index = losses.index(best)
        (ratio, duo), scales = knobs[index], tried[index] if index else None
        for linear_name, linear in linears.items():
            linear.weight.copy_(weights[linear_name])  # type: ignore[operator]
        row = {"name": name, "loss": best, "identity": identity, "ratio": ratio, "duo": duo, "fallback": None}
        return {**row, "seconds": time.monotonic() - start}, scales


def candidate(x_mean_I: Tensor, w_mean_I: Tensor, ratio: float, duo_scaling: bool) -> Tensor:
    """Scales for one ratio (equation 5), centred so that the largest and the smallest multiply to 1."""
    scales = x_mean_I.pow(ratio)
    if duo_scaling:
        scales = scales / (w_mean_I.pow(1 - ratio) + 1e-4)
    scales = scales.clamp(min=1e-4)
    scales = scales / (scales.max() * scales.min()).sqrt()
    return torch.where(torch.isfinite(scales), scales, torch.ones_like(scales))


def relative_magnitude(weights: dict[str, Tensor], schemes: dict[str, Scheme]) -> Tensor:
    """Mean over all rows of |w| relative to the largest in its group, `[I]`."""
    parts = []
    for name, weight in weights.items():
        grouped = weight.abs().reshape(*schemes[name].granularity.scale_shape(tuple(weight.shape)), -1)
        parts.append((grouped / (grouped.amax(-1, keepdim=True) + 1e-6)).reshape(weight.shape))
    return torch.cat(parts).mean(0)


def _round(
    weight: Tensor,
    scheme: Scheme,
    observer: Observer,
    dtype: torch.dtype,
    g: Tensor | None,
    gram: Tensor | None = None,
    check: bool = True,
) -> QuantizedTensor:
    if gram is None:
        found = observer.observe(weight, scheme, dtype, g)
    else:
        found = clipped_range(weight, gram, scheme, observer, dtype, g)
    scale, zero_point = qparams(*found, scheme, dtype, g, check)
    codes = quantize(weight, scale, zero_point, scheme.grid, g)
    return QuantizedTensor(codes, scale, zero_point, scheme, tuple(weight.shape), g)


def _empty(block: Block, linears: list[str], axes: int) -> dict[str, Tensor]:
    """Zeros for each linear, in-features long on each axis."""
    weights = {name: block.module.get_parameter(f"{name}.weight") for name in linears}
    return {name: w.new_zeros([w.shape[1]] * axes, dtype=torch.float32) for name, w in weights.items()}


def _part(name: str) -> str:
    """Of a block: attention or the MLP, as a rule. Scales are folded within one, or into a norm."""
    return name.partition(".")[0]


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
