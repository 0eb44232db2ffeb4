"""adapt: a frozen model with adapters that train, and what they merge to."""

import torch
from torch import nn

from qat.nn.adapter import LoRA, QLoRA
from qat.nn.fake_quantize import FakeQuantize
from qat.nn.linear import QATLinear
from qat.nn.lora import LowRank
from qat.nn.qlora import QLoRALinear
from qat.numerics.recipe import Recipe
from qat.surgery.convert import Folded, unquantized
from qat.surgery.match import Plan, match
from qat.surgery.prepare import fake_quants, prepare_unquantized


def add_lora(student: nn.Module, adapter: LoRA) -> None:
    """Gives every quantized linear of a prepared model, in place, an adapter, and freezes the rest (LoRA-QAT).

    What trains afterwards: A and B; scales and zero points, as far as the estimators learn them; norms and biases if
    asked; embeddings if `prepare` was asked. `convert` merges: the codes are those of W + s B A.

    Args:
        student: A model after `prepare`, and after `start_from` if it starts from a method.
        adapter: Rank, scaling and seed.
    """
    _freeze(student, adapter.norms)
    generator = torch.Generator().manual_seed(adapter.seed)
    for linear in fake_quants(student).values():
        if isinstance(linear, QATLinear):  # a table that is looked up keeps its rows
            linear.adapter = _low_rank(linear, adapter, generator)


def prepare_qlora(
    model: nn.Module,
    recipe: Recipe,
    adapter: QLoRA,
    storage: torch.dtype = torch.bfloat16,
    train_embeddings: bool = False,
) -> Plan:
    """Replaces, in place, every linear that the recipe quantizes by a `QLoRALinear`, and freezes the rest.

    The recipe says which linears; their schemes, those of inputs and of keys and values are for whatever quantizes the
    merged weights. Unquantized tensors that train enter the forward rounded to the storage dtype, as in `prepare`.

    Returns:
        The recipe on this model.

    Raises:
        ValueError: The recipe does not fit the model, the group size does not divide a linear's in-features, or a
            weight is not finite; the message names the module.
    """
    plan = match(model, recipe)
    _freeze(model, adapter.norms)
    generator = torch.Generator().manual_seed(adapter.seed)
    for name in plan.quantized:
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        thin = _low_rank(linear, adapter, generator)
        try:
            replaced = QLoRALinear(linear, thin, adapter.group_size, adapter.dropout, storage)
        except ValueError as error:
            raise ValueError(f"{name}: adapter.group_size={adapter.group_size}: {error}") from None
        model.set_submodule(name, replaced)
    prepare_unquantized(model, storage, train_embeddings)
    return plan


@torch.no_grad()
def merge(model: nn.Module, storage: torch.dtype = torch.bfloat16) -> Folded:
    """Every tensor that QLoRA changed, in the storage dtype: `round(W_nf4 + s B A)`, summed in fp32; norms if trained.

    Args:
        model: After `prepare_qlora` and training; it is left as it is.
        storage: Storage dtype of the export.

    Returns:
        Parameter name of the full-precision model to tensor, for `apply(model, {}, folded)`: an unquantized model,
        which any post-training method can quantize. `nn/qlora.py` bounds how far it is from what was trained.

    Raises:
        ValueError: A tensor is not finite; names it.
    """
    folded = unquantized(model)
    for name, linear in model.named_modules():
        if isinstance(linear, QLoRALinear):
            value = linear.merged().to(storage)
            if not bool(torch.isfinite(value).all()):
                raise ValueError(f"{name}.weight: not finite; training has diverged, lower the learning rate")
            folded[f"{name}.weight"] = value
    return folded


def _low_rank(linear: nn.Linear, adapter: LoRA | QLoRA, generator: torch.Generator) -> LowRank:
    size, device = (linear.out_features, linear.in_features), linear.weight.device
    return LowRank(*size, adapter.rank, adapter.alpha, generator, device)


def _freeze(model: nn.Module, norms: bool) -> None:
    """Freezes all but fake-quantization, embeddings (which is decided elsewhere), and norms and biases if asked."""
    own = (FakeQuantize, nn.Embedding)
    kept = {id(p) for module in model.modules() if isinstance(module, own) for p in module.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in kept and not (norms and parameter.dim() < 2):
            parameter.requires_grad_(False)
