"""Round to nearest: the baseline that needs no data, on the min-max or on the MSE-searched range."""

import time
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat.nn.observers.base import Observer
from qat.numerics.affine import divisor, quantize
from qat.numerics.metrics import sqnr
from qat.numerics.qtensor import QuantizedTensor
from qat.numerics.recipe import Recipe
from qat.surgery.match import match
from qat.surgery.prepare import families
from qat.surgery.walk import Changes


@torch.no_grad()
def rtn(
    model: PreTrainedModel,
    recipe: Recipe,
    batches: list[Tensor],
    *,
    observer: Observer,
    dtype: torch.dtype = torch.bfloat16,
    store: Path | None = None,
    progress: object = None,
) -> Changes:
    """Rounds every weight of the recipe on the range that `observer` finds; the model is left as it is.

    Args:
        model: Any causal language model.
        recipe: Module name to scheme.
        batches: Not looked at.
        observer: Finds ranges.
        dtype: Storage dtype of the scales.
        store: Not needed: there is nothing worth resuming.
        progress: Likewise.

    Raises:
        ValueError: The recipe does not fit the model, or a weight is not finite; names the module.
    """
    changes, schemes = Changes(), match(model, recipe).quantized
    together = families(model, schemes)
    for name, scheme in schemes.items():
        start = time.monotonic()
        linear = model.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        weight = linear.weight.detach().float()
        try:
            g = divisor((model.get_parameter(f"{n}.weight") for n in together[name]), scheme)
            scale, zero_point = observer.qparams(weight, scheme, dtype, g)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
        codes = quantize(weight, scale, zero_point, scheme.grid, g)
        tensor = QuantizedTensor(codes, scale, zero_point, scheme, tuple(weight.shape), g)
        changes.tensors[name] = tensor
        quality = sqnr(weight, tensor.dequantize(torch.float32))
        changes.layers.append({"name": name, "sqnr_db": quality, "seconds": time.monotonic() - start})
    return changes
