"""prepare: a Hugging Face model becomes one that computes, in training, with what will be served."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from qat.nn.estimators import Estimator
from qat.nn.fake_quantize import FakeQuantize, Phase
from qat.nn.linear import QATLinear
from qat.nn.observers.base import Observer
from qat.nn.observers.minmax import MinMax
from qat.numerics.recipe import Recipe
from qat.surgery.match import Plan, match


class Stored(nn.Module):
    """A parameter as it will be stored: rounded to the storage dtype, straight through for the gradient."""

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def forward(self, master: Tensor) -> Tensor:
        """The rounded parameter, in the master's dtype."""
        return _Round.apply(master, self.dtype)


class _Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, master: Tensor, dtype: torch.dtype) -> Tensor:
        return master.to(dtype).to(master.dtype)

    @staticmethod
    def backward(ctx: object, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def prepare(
    model: nn.Module,
    recipe: Recipe,
    observer: Observer,
    estimator: Estimator,
    storage: torch.dtype = torch.bfloat16,
    train_embeddings: bool = False,
) -> Plan:
    """Replaces, in place, every linear that the recipe quantizes by a `QATLinear` and takes its scales from its weight.

    What stays unquantized and trains (norms, biases, unquantized linears) enters the forward through a straight-through
    rounding to the storage dtype, since that is what will be served. Embeddings, and a head tied to them, are frozen
    unless `train_embeddings`.

    Args:
        model: A model with fp32 parameters.
        recipe: Module name to scheme.
        observer: Finds the ranges of weights; inputs, which are dynamic, always take their min-max range.
        estimator: The gradient of rounding.
        storage: Storage dtype of the export.
        train_embeddings: Whether embeddings train.

    Returns:
        What was done to which module, and what was left alone and why.

    Raises:
        ValueError: The recipe does not fit the model (`surgery.match`), a parameter is not fp32, an input scheme is
            static, or a weight is not finite; the message names the module.
    """
    plan = match(model, recipe)
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise ValueError(f"{name}: {parameter.dtype}; masters are fp32, load the model in float32")
    for row in plan.rows:
        if row.input is not None and not row.input.dynamic:
            raise ValueError(f"{row.name}: input scheme {row.input} is static; set dynamic=true")
    for row in plan.rows:
        if row.weight is None:
            continue
        linear = model.get_submodule(row.name)
        assert isinstance(linear, nn.Linear)
        device = linear.weight.device
        weight = FakeQuantize(row.weight, row.shape, observer, estimator, storage, row.name, device)
        weight.observe(linear.weight)
        input = None if row.input is None else FakeQuantize(row.input, None, MinMax(), estimator, storage, row.name)
        model.set_submodule(row.name, QATLinear.from_float(linear, weight, input))
    set_phase(model, Phase.LEARN if estimator.learns_scale else Phase.FROZEN)
    _freeze_embeddings(model, train_embeddings)
    _round_unquantized(model, storage)
    return plan


def fake_quants(model: nn.Module) -> dict[str, QATLinear]:
    """The quantized linears of a prepared model, by module name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, QATLinear)}


def set_phase(model: nn.Module, phase: Phase) -> None:
    """Puts every fake-quantization of a prepared model into a phase."""
    for module in model.modules():
        if isinstance(module, FakeQuantize):
            module.phase = phase


def _freeze_embeddings(model: nn.Module, train: bool) -> None:
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.requires_grad_(train)


def _round_unquantized(model: nn.Module, storage: torch.dtype) -> None:
    for name, module in list(model.named_modules()):
        if isinstance(module, FakeQuantize):
            continue
        for key, parameter in list(module.named_parameters(recurse=False)):
            quantized = isinstance(module, QATLinear) and key == "weight"
            if parameter.requires_grad and not quantized and "parametrizations" not in name:
                parametrize.register_parametrization(module, key, Stored(storage), unsafe=True)
