"""What other people's loaders make of an export: every weight, bit for bit, and the logits."""

from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.modeling.kvcache import KV_CACHE_ATTR
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor

from qat.evaluation.precision import compared_in, computing
from qat.evaluation.reference import Sequence, difference
from qat.formats import compressed_tensors
from qat.formats.base import Checkpoint
from qat.models.hf import load_quantized
from qat.nn.kv import quantize_kv
from qat.numerics.scheme import Scheme


def library(checkpoint: Checkpoint) -> dict[str, Any]:
    """Decodes every packed weight with the compressed-tensors library, and compares it with our own decoding.

    Both in the dtype of the scales. The file's own config groups say how, so this checks them as well.
    """
    groups = checkpoint.config["quantization_config"]["config_groups"].values()
    compressor = BaseCompressor.get_value_from_registry(compressed_tensors.FORMAT)
    worst, where, dtypes = 0.0, None, set()
    for name, tensor in checkpoint.tensors.items():
        group = next(g for g in groups if name in g["targets"] or "Linear" in g["targets"])
        parts = compressed_tensors.pack_tensor(tensor)
        decoded = compressor.decompress(parts, QuantizationScheme(**group))["weight"]
        difference = _difference(decoded, tensor.dequantize(decoded.dtype))
        dtypes.add(str(decoded.dtype).removeprefix("torch."))
        if difference > worst:
            worst, where = difference, name
    path = "compressed_tensors BaseCompressor.decompress"
    return {"load_path": path, "dtype": ", ".join(sorted(dtypes)), "max_abs_diff": worst, "worst": where}


@torch.no_grad()
def transformers(checkpoint: Checkpoint, dtype: torch.dtype | None, sequences: list[Sequence]) -> dict[str, Any]:
    """Loads the directory with `AutoModelForCausalLM`, and compares every tensor with our own decoding.

    Args:
        checkpoint: The export.
        dtype: Dtype to load in; None is transformers' default, the storage dtype.
        sequences: Reference logits to compare with, where `dtype` is fp32.

    Returns:
        Load path, dtype, largest difference over all tensors and where; with fp32 also that of the logits.
    """
    symmetric = all(rule.weight is None or rule.weight.symmetric for rule in checkpoint.recipe.rules.values())
    model = load_quantized(checkpoint.path, dtype, dequantize=not symmetric)
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    worst, where = 0.0, None
    for name, tensor in checkpoint.tensors.items():
        weight = own.pop(f"{name}.weight")
        worst, where = max((worst, where), (_difference(weight, tensor.dequantize(weight.dtype)), name), key=_first)
    for name, value in checkpoint.plain.items():
        found = own.pop(name)
        worst, where = max((worst, where), (_difference(found, value.to(found.dtype)), name), key=_first)
    path = "AutoModelForCausalLM.from_pretrained" + (
        "" if symmetric else " with CompressedTensorsConfig(dequantize=True)"
    )
    compares = dtype is torch.float32 and bool(sequences)
    if compares and checkpoint.recipe.kv is not None:
        path += ", its cache replaced by ours"
        _replace_cache(model, checkpoint.recipe.kv)
    row: dict[str, Any] = {
        "load_path": path, "dtype": str(model.dtype).removeprefix("torch."), "max_abs_diff": worst, "worst": where
    }  # fmt: skip
    return row | logits(model, sequences, compared_in(checkpoint.recipe)) if compares else row


def logits(model: Any, sequences: list[Sequence], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Largest difference of a model's logits in `dtype` from the reference's, and the largest reference logit."""
    worst = largest = 0.0
    with computing(dtype):
        for sequence in sequences:
            out = model(input_ids=sequence.ids[None, :-1], use_cache=False).logits[0].float()
            worst = max(worst, difference(out, sequence.logits))
            largest = max(largest, float(sequence.logits.abs().max()))
    return {"max_abs_logit_diff": worst, "max_abs_logit": largest}


def _replace_cache(model: Any, kv: Scheme) -> None:
    """compressed-tensors rounds keys and values too, but with its own scales: absmax / 127.5, and in the dtype of x."""
    for module in model.modules():
        if hasattr(module, KV_CACHE_ATTR):
            module.quantization_enabled = False
    quantize_kv(model, kv)


def _difference(a: Tensor, b: Tensor) -> float:
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if torch.equal(a, b) and bool(torch.isfinite(a).all()):  # as a rule; fewer passes than the difference takes
        return 0.0
    difference = (a.float() - b.float()).abs().max() if a.numel() else torch.zeros(())
    return float(difference) if bool(torch.isfinite(difference)) else float("inf")


def _first(pair: tuple[float, str | None]) -> float:
    return pair[0]
