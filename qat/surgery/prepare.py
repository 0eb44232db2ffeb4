"""prepare: a Hugging Face model becomes one that computes, in training, with what will be served."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from transformers import PreTrainedModel

from qat.models.families import STRUCTURES
from qat.nn.embedding import QATEmbedding
from qat.nn.estimators import SEQ, Clipped, Estimator, LSQPlus
from qat.nn.fake_quantize import FakeQuantize, Phase
from qat.nn.kv import quantize_kv
from qat.nn.linear import QATLinear
from qat.nn.lora import LowRank
from qat.nn.observers.base import Observer
from qat.nn.observers.minmax import MinMax
from qat.numerics.grid import Codebook
from qat.numerics.recipe import Recipe
from qat.numerics.scheme import E8M0, Scheme
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
    input_observer: Observer | None = None,
    input_estimator: Estimator | None = None,
) -> Plan:
    """Replaces, in place, every linear that the recipe quantizes by a `QATLinear` and takes its scales from its weight.

    Likewise every embedding by a `QATEmbedding`; a head tied to it has the same table and the same `FakeQuantize`, and
    its codes are trained by both uses. What stays unquantized and trains (norms, biases, unquantized linears) enters
    the forward through a straight-through rounding to the storage dtype, since that is what will be served. The tables
    of embeddings, and a head tied to them, are frozen unless `train_embeddings`; the scales of quantized ones train as
    all others do. Static ranges of inputs are not known yet: `surgery.calibrate` follows. Keys and values are
    fake-quantized if the recipe has a `kv`, in every phase: they have no range to observe and no scale to learn.

    Args:
        model: A model with fp32 parameters.
        recipe: Module name to scheme.
        observer: Finds the ranges of weights.
        estimator: The gradient of rounding weights.
        storage: Storage dtype of the export.
        train_embeddings: Whether the tables of embeddings train.
        input_observer: Finds the static ranges of inputs; None: their extremes. Dynamic ranges are always min-max.
        input_estimator: The gradient of rounding inputs on a static range; None: clipped straight-through, which
            dynamic ranges always have (their scale is not differentiated: LLM-QAT, arXiv:2305.17888).

    Returns:
        What was done to which module, and what was left alone and why.

    Raises:
        ValueError: The recipe does not fit the model (`surgery.match`) or the estimator a scheme, a parameter is not
            fp32, or a weight is not finite; the message names the module.
    """
    plan = match(model, recipe)
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise ValueError(f"{name}: {parameter.dtype}; masters are fp32, load the model in float32")
    input_estimator = input_estimator or Clipped()
    for row in plan.rows:
        if row.weight is not None:
            check_estimator(row.name, estimator, row.weight)
        if row.input is not None and not row.input.dynamic:
            check_estimator(row.name, input_estimator, row.input)
    if recipe.kv is not None:
        assert isinstance(model, PreTrainedModel), "keys and values are what transformers' attention calls so"
        quantize_kv(model, recipe.kv)
    weights: dict[str, FakeQuantize] = {}
    for row in plan.rows:
        module = model.get_submodule(row.name)
        if row.weight is not None:
            device = model.get_parameter(f"{row.name}.weight").device
            weight = FakeQuantize(row.weight, row.shape, observer, estimator, storage, row.name, device)
            weights[row.name] = weight
        elif row.shares is not None:
            weight = weights[row.shares]
        else:
            continue
        if isinstance(module, nn.Embedding):
            model.set_submodule(row.name, QATEmbedding.from_float(module, weight))
            continue
        assert isinstance(module, nn.Linear)
        input = None
        if row.input is not None:
            device = module.weight.device
            input = input_fake_quant(row.name, row.input, input_observer, input_estimator, storage, device)
        model.set_submodule(row.name, QATLinear.from_float(module, weight, input))
    observe(model)
    learns = estimator.learns_scale or input_estimator.learns_scale
    set_phase(model, Phase.LEARN if learns else Phase.FROZEN)
    prepare_unquantized(model, storage, train_embeddings)
    return plan


def prepare_unquantized(model: nn.Module, storage: torch.dtype, train_embeddings: bool = False) -> None:
    """Embeddings freeze, unless they train; what else trains unquantized enters the forward rounded to `storage`.

    Of a model without a quantized linear it makes one that is fine-tuned as it will be stored.
    """
    _freeze_embeddings(model, train_embeddings)
    _round_unquantized(model, storage)


def input_fake_quant(
    name: str,
    scheme: Scheme,
    observer: Observer | None,
    estimator: Estimator,
    storage: torch.dtype,
    device: torch.device,
) -> FakeQuantize:
    """What quantizes the inputs of module `name`."""
    if scheme.dynamic:
        return FakeQuantize(scheme, None, MinMax(), Clipped(), storage, f"{name} (input)", device, running=True)
    shape = (1,)  # PerTensor, as `match` saw to
    return FakeQuantize(
        scheme, shape, observer or MinMax(), estimator, storage, f"{name} (input)", device, running=True
    )


def check_estimator(name: str, estimator: Estimator, scheme: Scheme) -> None:
    """Raises ValueError, naming the module, if an estimator cannot learn what it learns on a scheme."""
    kind = type(estimator).__name__
    if estimator.learns_scale and scheme.scale_dtype == E8M0:
        raise ValueError(
            f"{name}: estimator {kind} learns a scale, but those of {scheme} are powers of two; use estimator=clipped"
        )
    if isinstance(estimator, SEQ) and not (isinstance(scheme.grid, Codebook) and scheme.grid.integer_bits):
        raise ValueError(
            f"{name}: estimator SEQ is for the codebooks binary, ternary and seq2, not for {scheme}; use estimator=lsq"
        )
    if isinstance(estimator, LSQPlus) and scheme.symmetric:
        raise ValueError(
            f"{name}: estimator LSQPlus learns an offset, but {scheme} is symmetric; set symmetric=false or use "
            f"estimator=lsq"
        )


def families(model: nn.Module, schemes: Mapping[str, Scheme]) -> dict[str, tuple[str, ...]]:
    """Module name to the modules that share its global scale: query, key and value; gate and up.

    Serving engines multiply them as one matrix. Where the model's family is not described, and on schemes with one
    level of scales, each is alone.
    """
    alone: dict[str, tuple[str, ...]] = {name: (name,) for name in schemes}
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in STRUCTURES:
        return alone
    for stage in STRUCTURES[kind].stages:
        for name in schemes:
            if name.endswith(f".{stage[0]}"):
                prefix = name.removesuffix(stage[0])
                found = tuple(n for part in stage if schemes.get(n := prefix + part) == schemes[name])
                if schemes[name].two_level:
                    alone |= dict.fromkeys(found, found)
    return alone


def fake_quants(model: nn.Module) -> dict[str, QATLinear | QATEmbedding]:
    """The quantized linears and embeddings of a prepared model, by module name; of a tied pair the embedding alone."""
    found: dict[str, QATLinear | QATEmbedding] = {}
    seen: set[FakeQuantize] = set()
    for name, module in model.named_modules():
        if isinstance(module, QATLinear | QATEmbedding) and module.weight_fake_quant not in seen:
            seen.add(module.weight_fake_quant)
            found[name] = module
    return found


@torch.no_grad()
def observe(model: nn.Module) -> None:
    """Takes the scales of every quantized weight from it as it now is; what was learned before is forgotten.

    Raises:
        ValueError: A weight is not finite; names the module.
    """
    linears = fake_quants(model)
    together = families(model, {name: linear.weight_fake_quant.scheme for name, linear in linears.items()})
    for name, linear in linears.items():
        masters = {other: linears[other].master() for other in together[name]}
        linear.weight_fake_quant.observe(masters[name], tuple(masters.values()))


def set_phase(model: nn.Module, phase: Phase) -> None:
    """Puts every fake-quantization of a prepared model into a phase."""
    for module in model.modules():
        if isinstance(module, FakeQuantize):
            module.phase = phase


def set_strength(model: nn.Module, strength: float) -> None:
    """How far every fake-quantization goes from the tensor to its grid, 1 being all the way."""
    for module in model.modules():
        if isinstance(module, FakeQuantize):
            module.strength = strength


def _freeze_embeddings(model: nn.Module, train: bool) -> None:
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.weight.requires_grad_(train)


def _round_unquantized(model: nn.Module, storage: torch.dtype) -> None:
    kinds: dict[tuple[type | str, ...], type] = {}
    for name, module in list(model.named_modules()):
        if isinstance(module, FakeQuantize | LowRank):
            continue
        kind, keys = type(module), []
        for key, parameter in list(module.named_parameters(recurse=False)):
            quantized = isinstance(module, QATLinear | QATEmbedding) and key == "weight"
            if parameter.requires_grad and not quantized and "parametrizations" not in name:
                parametrize.register_parametrization(module, key, Stored(storage), unsafe=True)
                keys.append(key)
        if keys:  # one class for all that are alike: torch makes one for each, and a compiler would compile each anew
            module.__class__ = kinds.setdefault((kind, *keys), type(module))
