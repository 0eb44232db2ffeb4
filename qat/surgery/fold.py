"""fold: scales move from where a linear's input comes from into the linear; the function stays.

Legend: I in-features. A scale s[I] multiplies the columns of some linears, and divides the output channels of what
feeds them. AWQ and SmoothQuant differ in how they find scales, and fold them alike.
"""

import torch
from torch import Tensor, nn

from qat.models.structure import Smoothing
from qat.surgery.walk import Block


def foldable(block: Block, smoothing: Smoothing, weights: dict[str, Tensor]) -> bool:
    """Whether nothing that stays unquantized would have to absorb scales into a stored, rounded matrix.

    Args:
        block: The block.
        smoothing: Which linears, and what feeds them.
        weights: Weights of the block that will be quantized, by their name in it.
    """
    previous = block.module.get_submodule(smoothing.previous)
    return all(name in weights for name in (*smoothing.linears, *_linear(smoothing.previous, previous)))


def absorbed(block: Block, smoothing: Smoothing, scales_I: Tensor, dtype: torch.dtype, offset: float = 0.0) -> Tensor:
    """The scales nearest to the wanted ones that what comes before the linears can absorb, `[I]`.

    A value projection has one channel for several query heads: they take the geometric mean of what they want. A norm's
    weight is rounded to the storage dtype: the scale is what that rounding makes of it. A linear is quantized after the
    folding, so it absorbs anything.

    Args:
        block: The block.
        smoothing: Which linears, and what feeds them.
        scales_I: The wanted scales.
        dtype: Storage dtype.
        offset: What a norm adds to its weight (`Structure.offset`).
    """
    previous = block.module.get_submodule(smoothing.previous)
    if isinstance(previous, nn.Linear):
        if not smoothing.repeats:
            return scales_I
        heads = _per_head(block, smoothing, scales_I, previous.out_features)
        return heads.log().mean(1, keepdim=True).exp().expand_as(heads).reshape(-1)
    weight = block.module.get_parameter(f"{smoothing.previous}.weight").float() + offset
    effective = weight / ((weight / scales_I - offset).to(dtype).float() + offset)
    return torch.where(torch.isfinite(effective) & (effective > 0), effective, torch.ones_like(effective))


def fold(
    block: Block,
    smoothing: Smoothing,
    weights: dict[str, Tensor],
    scales_I: Tensor,
    dtype: torch.dtype,
    offset: float = 0.0,
) -> dict[str, Tensor]:
    """Multiplies the linears by the scales and divides what comes before, in the block and in `weights`.

    Args:
        block: The block; its module is changed.
        smoothing: Which linears, and what feeds them.
        weights: Weights of the block that will be quantized, by their name in it; changed.
        scales_I: What `absorbed` said.
        dtype: Storage dtype.
        offset: What a norm adds to its weight (`Structure.offset`).

    Returns:
        The stored tensors that changed: a norm's weight and bias or a linear's bias, under their absolute names.
    """
    module, changed = block.module, {}
    for name in smoothing.linears:
        weights[name] *= scales_I
    previous = module.get_submodule(smoothing.previous)
    inverse = scales_I
    if isinstance(previous, nn.Linear):
        if smoothing.repeats:
            inverse = _per_head(block, smoothing, scales_I, previous.out_features)[:, 0].reshape(-1)
        weights[smoothing.previous] /= inverse[:, None]
    else:
        weight = module.get_parameter(f"{smoothing.previous}.weight")
        changed["weight"] = ((weight + offset) / scales_I - offset).to(dtype)
    if getattr(previous, "bias", None) is not None:
        changed["bias"] = (module.get_parameter(f"{smoothing.previous}.bias") / inverse).to(dtype)
    for name in (*smoothing.linears, *_linear(smoothing.previous, previous)):
        module.get_parameter(f"{name}.weight").copy_(weights[name])
    for key, value in changed.items():
        module.get_parameter(f"{smoothing.previous}.{key}").copy_(value)
    return {f"{block.name}.{smoothing.previous}.{key}": value for key, value in changed.items()}


def _per_head(block: Block, smoothing: Smoothing, scales_I: Tensor, channels: int) -> Tensor:
    """Scales of the query side as `[value heads, query heads that share one, head]`."""
    attention = block.module.get_submodule(smoothing.previous.rpartition(".")[0])
    head: int = attention.head_dim  # type: ignore[assignment]
    return scales_I.view(channels // head, -1, head)


def _linear(name: str, module: nn.Module) -> tuple[str, ...]:
    return (name,) if isinstance(module, nn.Linear) else ()
