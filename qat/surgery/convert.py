"""convert: a trained model becomes integers, once and for all; nothing downstream evaluates a scale or a code again."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from qat.numerics.qtensor import QuantizedTensor
from qat.surgery.prepare import Stored, fake_quants

Tensors = dict[str, QuantizedTensor]
Folded = dict[str, Tensor]


@torch.no_grad()
def convert(model: nn.Module) -> tuple[Tensors, Folded]:
    """Codes, scales and zero points of every quantized linear, and every unquantized tensor that training changed.

    Args:
        model: A prepared model; it is left as it is.

    Returns:
        Module name to quantized weight, and parameter name to unquantized tensor in the storage dtype.

    Raises:
        ValueError: A scale, a master weight or an unquantized tensor is not finite; the message names it.
    """
    tensors: Tensors = {}
    for name, linear in fake_quants(model).items():
        quant = linear.weight_fake_quant
        scale, zero_point = quant.qparams()
        if not bool(torch.isfinite(scale).all()) or not bool(torch.isfinite(linear.weight).all()):
            raise ValueError(
                f"{name}: a scale or a weight is not finite; training has diverged, lower the learning rate"
            )
        zero_point = None if zero_point is None else zero_point.clone()
        shape = tuple(linear.weight.shape)
        tensors[name] = QuantizedTensor(quant.codes(linear.weight), scale, zero_point, quant.scheme, shape)
    folded: Folded = {}
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not isinstance(module, parametrize.ParametrizationList) or id(module.original) in seen:
            continue  # a tied parameter is stored once, under the name that comes first
        seen.add(id(module.original))
        stored = module[0]
        assert isinstance(stored, Stored), f"{name}: parametrized by somebody else"
        owner, _, key = name.rpartition(".parametrizations.")
        value = module.original.to(stored.dtype)
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{owner}.{key}: not finite; training has diverged, lower the learning rate")
        folded[f"{owner}.{key}"] = value.clone()
    return tensors, folded


@torch.no_grad()
def apply(
    model: PreTrainedModel, tensors: Tensors, folded: Folded, dtype: torch.dtype | None = None
) -> PreTrainedModel:
    """A copy of a full-precision model with dequantized weights and changed tensors in place: the graph that is judged.

    Args:
        model: The full-precision model; left as it is. Unchanged parameters are shared with the copy.
        tensors: Module name to quantized weight.
        folded: Parameter name to changed tensor.
        dtype: Dtype of the weights; None keeps the model's.
    """
    shared = {id(p): p for p in model.parameters()} | {id(b): b for b in model.buffers()}
    result = copy.deepcopy(model, memo=dict(shared))
    for name, tensor in tensors.items():
        _replace(result, f"{name}.weight", tensor.dequantize(dtype or model.get_parameter(f"{name}.weight").dtype))
    for name, value in folded.items():
        _replace(result, name, value)
    return result


def _replace(model: nn.Module, name: str, value: Tensor) -> None:
    old = model.get_parameter(name)
    if old.shape != value.shape:
        raise ValueError(f"{name}: of shape {tuple(value.shape)}, but the model has {tuple(old.shape)}")
    new = nn.Parameter(value.to(old.device, old.dtype), requires_grad=False)
    for module in model.modules():  # all of them: the parameter may be tied
        for key, parameter in module._parameters.items():
            if parameter is old:
                module._parameters[key] = new
