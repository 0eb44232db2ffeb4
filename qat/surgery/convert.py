"""convert: a trained model becomes integers, once and for all; nothing downstream evaluates a scale or a code again."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from qat.nn.estimators import Clipped
from qat.nn.fake_quantize import FakeQuantize, Phase
from qat.nn.kv import quantize_kv
from qat.nn.linear import compute_dtype
from qat.nn.observers.base import Observer
from qat.numerics.qtensor import QuantizedTensor
from qat.numerics.recipe import Recipe
from qat.numerics.scheme import is_input_scale
from qat.surgery.calibrate import needing
from qat.surgery.prepare import Stored, fake_quants, input_fake_quant

Tensors = dict[str, QuantizedTensor]
Folded = dict[str, Tensor]


@torch.no_grad()
def convert(model: nn.Module) -> tuple[Tensors, Folded]:
    """Codes, scales and zero points of every quantized weight, and every unquantized tensor that training changed.

    Args:
        model: A prepared model; it is left as it is.

    Returns:
        Module name to quantized weight, and parameter name to unquantized tensor in the storage dtype.

    Raises:
        ValueError: A scale, a master weight or an unquantized tensor is not finite; the message names it.
    """
    tensors: Tensors = {}
    for name, linear in fake_quants(model).items():
        quant, master = linear.weight_fake_quant, linear.master()
        scale, zero_point = quant.qparams()
        if not bool(torch.isfinite(scale.float()).all()) or not bool(torch.isfinite(master).all()):
            raise ValueError(
                f"{name}: a scale or a weight is not finite; training has diverged, lower the learning rate"
            )
        zero_point = None if zero_point is None else zero_point.clone()
        shape, g = tuple(master.shape), quant.global_scale
        g = None if g is None else g.clone()
        tensors[name] = QuantizedTensor(quant.codes(master), scale, zero_point, quant.scheme, shape, g)
    return tensors, input_scales(model) | unquantized(model)


@torch.no_grad()
def unquantized(model: nn.Module) -> Folded:
    """Every unquantized tensor that enters the forward rounded, as it is stored.

    Raises:
        ValueError: One is not finite; the message names it.
    """
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
    return folded


@torch.no_grad()
def input_scales(model: nn.Module) -> Folded:
    """What is stored of the calibrated inputs: `<module>.input_scale`, `.input_zero_point`, `.input_global_scale`."""
    result: Folded = {}
    for name, quant in needing(model).items():
        owner = name.removesuffix(".input_fake_quant")
        assert int(quant.seen), f"{owner}: its input was never calibrated"
        if quant.global_scale is not None:
            result[f"{owner}.input_global_scale"] = quant.global_scale.clone()
            continue
        scale, zero_point = quant.qparams()
        result[f"{owner}.input_scale"] = scale.clone()
        if zero_point is not None:
            result[f"{owner}.input_zero_point"] = zero_point.clone()
    return result


@torch.no_grad()
def quantize_inputs(
    model: nn.Module,
    recipe: Recipe,
    folded: Folded,
    observer: Observer | None = None,
    storage: torch.dtype = torch.bfloat16,
) -> None:
    """Fake-quantizes, in place, the inputs of every plain linear that the recipe says, with the scales of `folded`.

    A static scheme whose scale `folded` lacks waits for `calibrate`, and then keeps it in its dtype or in `storage`.
    """
    for name, linear in list(model.named_modules()):
        hit = recipe.rule_for(name) if isinstance(linear, nn.Linear) else None
        if hit is None or hit[1].input is None:
            continue
        device, scheme = next(linear.parameters()).device, hit[1].input
        quant = input_fake_quant(name, scheme, observer, Clipped(), storage, device)
        quant.phase = Phase.FROZEN
        for part in ("scale", "zero_point", "global_scale"):
            if (value := folded.get(f"{name}.input_{part}")) is not None:
                quant.register_buffer(part, value.to(device))
                quant.seen += 1
        linear.input_fake_quant = quant
        linear.register_forward_pre_hook(_quantized)


def _quantized(linear: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    assert isinstance(linear, nn.Linear)
    quant = linear.input_fake_quant
    assert isinstance(quant, FakeQuantize)
    return (quant(args[0], compute_dtype(args[0], linear.weight)), *args[1:])


@torch.no_grad()
def apply(
    model: PreTrainedModel,
    tensors: Tensors,
    folded: Folded,
    dtype: torch.dtype | None = None,
    recipe: Recipe | None = None,
) -> PreTrainedModel:
    """A copy of a full-precision model with dequantized weights and changed tensors in place: the graph that is judged.

    Args:
        model: The full-precision model; left as it is. Unchanged parameters are shared with the copy.
        tensors: Module name to quantized weight.
        folded: Parameter name to changed tensor.
        dtype: Dtype of the weights; None keeps the model's.
        recipe: Its schemes of inputs, keys and values are applied as well; None: weights only.
    """
    shared = {id(p): p for p in model.parameters()} | {id(b): b for b in model.buffers()}
    result = copy.deepcopy(model, memo=dict(shared))
    places = _places(result)
    for name, tensor in tensors.items():
        weight = f"{name}.weight"
        _replace(result, places, weight, tensor.dequantize(dtype or model.get_parameter(weight).dtype))
    for name, value in folded.items():
        if not is_input_scale(name):
            _replace(result, places, name, value)
    if recipe is not None:
        quantize_inputs(result, recipe, folded)
        quantize_kv(result, recipe.kv)
    return result


Places = dict[nn.Parameter, list[tuple[nn.Module, str]]]


def _places(model: nn.Module) -> Places:
    """Every module that holds a parameter, and the name by which it does: several where the parameter is tied."""
    places: Places = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(parameter, []).append((module, key))
    return places


def _replace(model: nn.Module, places: Places, name: str, value: Tensor) -> None:
    old = model.get_parameter(name)
    if old.shape != value.shape:
        raise ValueError(f"{name}: of shape {tuple(value.shape)}, but the model has {tuple(old.shape)}")
    new = nn.Parameter(value.to(old.device, old.dtype), requires_grad=False)
    places[new] = places.pop(old)
    for module, key in places[new]:
        module._parameters[key] = new
