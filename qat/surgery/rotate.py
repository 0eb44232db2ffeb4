"""rotate: a model whose hidden states are turned by orthogonal matrices, offline; its function stays, its format too.

QuaRot (arXiv:2404.00456, section 4), and R1 and R2 of SpinQuant (arXiv:2405.16406, section 3), with random matrices: a
rotation spreads outlying channels over all others, and what is then rounded has a narrower range. Legend: hidden states
h are rows, n(h) = h / rms(h), so n(h R) = n(h) R for an orthogonal R.

- R1, the residual stream, h' = h R. Weights of norms go into the linears behind them first, since they do not commute
  with R: `W' = W diag(w) R`, and the norm's weight becomes 1. What writes to the stream: `W' = R^T W`, `b' = b R`; the
  embedding: `E' = E R`; the head: `H' = H diag(w_last) R`.
- R2, values, v' = v R in each value head, one R for a block: `V' = R^T V`, `b' = b R`, and for each query head that
  reads it `O' = O R`. Attention weighs values linearly, so its scores do not matter.

A tied head cannot follow R1 in general: it has to be E R as embedding and E diag(w) R as head. Both are one matrix only
if the last norm's weight is one number throughout; that norm then stays as it is. (With another weight w' they agree if
R diag(w') = diag(w) R, where R mixes channels of one weight alone.) Otherwise R1 is refused; it needs a model whose
head is its own.
"""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat.models.families import structure_of
from qat.models.structure import Structure
from qat.numerics.orthogonal import Kind, random_orthogonal

Tensors = dict[str, Tensor]


@torch.no_grad()
def rotated(model: PreTrainedModel, kind: Kind, residual: bool, values: bool, seed: int) -> Tensors:
    """What a rotation changes.

    Args:
        model: A causal language model of a family that `models.families` knows; left as it is.
        kind: See `random_orthogonal`.
        residual: Whether the residual stream is rotated (R1).
        values: Whether values are (R2).
        seed: Of the matrices.

    Returns:
        Parameter name to changed tensor: computed in fp64 and rounded once, to the parameter's dtype or, where that is
        narrower, to fp32.

    Raises:
        ValueError: The family is not known, a size has no matrix of this kind, neither of both is to be rotated, or the
            head is tied and cannot follow.
    """
    if not (residual or values):
        raise ValueError("residual=false and values=false: nothing would be rotated")
    structure, generator = structure_of(model.config.model_type), torch.Generator().manual_seed(seed)
    layers, device = model.get_submodule(structure.blocks), next(model.parameters()).device
    assert isinstance(layers, nn.ModuleList)
    moved: Tensors = {}
    if residual:
        check_stream(model)
        stream = _matrix("residual", model.config.hidden_size, kind, generator).to(device)
        moved |= _ends(model, structure, stream)
    for index, layer in enumerate(layers):
        before = {name: parameter.double() for name, parameter in layer.named_parameters()}
        after = dict(before)
        if residual:
            _rotate_residual(layer, structure, after, stream)
        if values:
            _rotate_values(layer, structure, after, kind, generator)
        for name, value in after.items():
            if value is not before[name]:
                moved[f"{structure.blocks}.{index}.{name}"] = value.to(_wide(layer.get_parameter(name)))
    return moved


def check_stream(model: PreTrainedModel) -> None:
    """Whether the residual stream can be rotated (R1).

    Raises:
        ValueError: The family is not known, or the head is tied and cannot follow.
    """
    structure, table = structure_of(model.config.model_type), model.get_input_embeddings().weight
    gain = model.get_parameter(f"{structure.norm}.weight").double() + structure.offset
    if model.get_output_embeddings().weight is table and not bool((gain == gain[0]).all()):
        name = next(name for name, parameter in model.named_parameters() if parameter is table)
        raise ValueError(
            f"{structure.norm}: its weight is not one number throughout, and the head is tied to {name}: no one matrix "
            f"is both of them after rotating the residual stream. Use residual=false, which rotates values alone, or "
            f"give the head a matrix of its own with model.untie=true"
        )


def _ends(model: PreTrainedModel, structure: Structure, stream: Tensor) -> Tensors:
    """The embedding, the last norm and the head under R1."""
    table, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    norm = model.get_parameter(f"{structure.norm}.weight")
    gain = norm.double() + structure.offset
    moved = {names[id(table)]: (table.double() @ stream).to(_wide(table))}
    if head is not table:
        moved[names[id(head)]] = ((head.double() * gain) @ stream).to(_wide(head))
        moved[f"{structure.norm}.weight"] = torch.full_like(gain, 1 - structure.offset).to(_wide(norm))
    return moved


def _rotate_residual(layer: nn.Module, structure: Structure, parameters: Tensors, stream: Tensor) -> None:
    """R1 in one block, in place of its parameters."""
    reading: set[str] = set()
    for smoothing in structure.smoothings:
        if isinstance(layer.get_submodule(smoothing.previous), nn.Linear):
            continue
        norm = f"{smoothing.previous}.weight"
        gain = parameters[norm] + structure.offset
        for name in smoothing.linears:
            parameters[f"{name}.weight"] = (parameters[f"{name}.weight"] * gain) @ stream
        parameters[norm] = torch.full_like(gain, 1 - structure.offset)
        reading |= set(smoothing.linears)
    for name in (name for stage in structure.stages for name in stage if name not in reading):
        parameters[f"{name}.weight"] = stream.T @ parameters[f"{name}.weight"]
        if f"{name}.bias" in parameters:
            parameters[f"{name}.bias"] = parameters[f"{name}.bias"] @ stream


def _rotate_values(
    layer: nn.Module, structure: Structure, parameters: Tensors, kind: Kind, generator: torch.Generator
) -> None:
    """R2 in one block, in place of its parameters; query heads read the value head that their group shares."""
    for smoothing in structure.smoothings:
        if not smoothing.repeats:
            continue
        size: int = layer.get_submodule(smoothing.previous.rpartition(".")[0]).head_dim  # type: ignore[assignment]
        value, (output,) = smoothing.previous, smoothing.linears
        matrix = _matrix("values", size, kind, generator).to(parameters[f"{value}.weight"].device)
        heads = parameters[f"{value}.weight"].unflatten(0, (-1, size))
        parameters[f"{value}.weight"] = (matrix.T @ heads).flatten(0, 1)
        if f"{value}.bias" in parameters:
            parameters[f"{value}.bias"] = (parameters[f"{value}.bias"].unflatten(0, (-1, size)) @ matrix).flatten()
        readers = parameters[f"{output}.weight"].unflatten(1, (-1, size))
        parameters[f"{output}.weight"] = (readers @ matrix).flatten(1)


def _matrix(which: str, size: int, kind: Kind, generator: torch.Generator) -> Tensor:
    try:
        return random_orthogonal(size, kind, generator)
    except ValueError as error:
        raise ValueError(f"{which}: {error}") from None


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)
