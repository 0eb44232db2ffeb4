"""What other people's loaders make of an export: every weight, bit for bit, and the logits."""

from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.modeling.kvcache import KV_CACHE_ATTR
from compressed_tensors.quantization import QuantizationScheme
from torch import Tensor

from qat.evaluation.precision import compared_in, computing
from qat.evaluation.reference import Sequence, difference
from qat.formats.base import Checkpoint
from qat.formats.ct_args import PACKED, sub_format
from qat.formats.ct_parts import pack_tensor
from qat.models.hf import load_quantized
from qat.nn.kv import quantize_kv
from qat.numerics.recipe import Recipe
from qat.numerics.scheme import E4M3, E8M0, Scheme, is_input_scale
from qat.surgery.convert import quantize_inputs


def library(checkpoint: Checkpoint) -> dict[str, Any]:
    """Decodes every quantized weight with the compressed-tensors library, and compares it with our own decoding.

    Both in the dtype that the library decodes to. The file's own config groups say how, so this checks them as well.
    """
    quantization = checkpoint.config["quantization_config"]
    groups = quantization["config_groups"].values()
    worst, where, dtypes = 0.0, None, set()
    for name, tensor in checkpoint.tensors.items():
        group = next(g for g in groups if name in g["targets"] or "Linear" in g["targets"])
        named = group.get("format") or quantization["format"]
        compressor = BaseCompressor.get_value_from_registry(named)
        parts = pack_tensor(tensor, named == PACKED)
        decoded = compressor.decompress(parts, QuantizationScheme(**group))["weight"]
        difference = _difference(decoded, tensor.dequantize(decoded.dtype))
        dtypes.add(str(decoded.dtype).removeprefix("torch."))
        if difference > worst:
            worst, where = difference, name
    path = "compressed_tensors BaseCompressor.decompress"
    return {"load_path": path, "dtype": ", ".join(sorted(dtypes)), "max_abs_diff": worst, "worst": where}


def dequantizes(recipe: Recipe) -> bool:
    """Whether transformers must be asked to dequantize: with compressed-tensors 0.20 it reads no packed zero points."""
    return any(not weight.symmetric and sub_format(weight, input) == PACKED for weight, input in _pairs(recipe))


def loads(recipe: Recipe) -> bool:
    """Whether transformers loads a file of this recipe: asked to dequantize, it knows one scheme for all of it."""
    return not dequantizes(recipe) or len(_pairs(recipe)) == 1


def decodes_in_fp32(recipe: Recipe) -> bool:
    """Whether transformers, asked for fp32, has weights that were not rounded to bf16 first.

    The library decodes zero points and block-scaled weights (NVFP4, MX) in bf16 whatever it is asked for; a model that
    is loaded in fp32 then cannot even multiply by the latter.
    """
    return all(weight.symmetric and weight.scale_dtype not in (E4M3, E8M0) for weight, _ in _pairs(recipe))


def _pairs(recipe: Recipe) -> set[tuple[Scheme, Scheme | None]]:
    return {(rule.weight, rule.input) for rule in recipe.rules.values() if rule.weight is not None}


@torch.no_grad()
def transformers(checkpoint: Checkpoint, dtype: torch.dtype | None, sequences: list[Sequence]) -> dict[str, Any]:
    """Loads the directory with `AutoModelForCausalLM`, and compares every tensor with our own decoding.

    Args:
        checkpoint: The export.
        dtype: Dtype to load in; None is transformers' default, the storage dtype.
        sequences: Reference logits to compare with, where `dtype` is fp32.

    Returns:
        Load path, dtype, largest difference over all tensors and where; with fp32 also that of the logits, with keys,
        values and inputs of linears rounded by us, since the library has other scales; with its own inputs it is only
        reported.
    """
    dequantize = dequantizes(checkpoint.recipe)
    model = load_quantized(checkpoint.path, dtype, dequantize=dequantize)
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    worst, where = 0.0, None
    for name, tensor in checkpoint.tensors.items():
        weight = own.pop(f"{name}.weight")
        worst, where = max((worst, where), (_difference(weight, tensor.dequantize(weight.dtype)), name), key=_first)
    for name, value in checkpoint.plain.items():
        if dequantize and is_input_scale(name):
            continue  # asked to dequantize, it quantizes no inputs
        found = own.pop(name)
        worst, where = max((worst, where), (_difference(found, value.to(found.dtype)), name), key=_first)
    path = "AutoModelForCausalLM.from_pretrained" + (
        " with CompressedTensorsConfig(dequantize=True)" if dequantize else ""
    )
    row: dict[str, Any] = {
        "load_path": path, "dtype": str(model.dtype).removeprefix("torch."), "max_abs_diff": worst, "worst": where
    }  # fmt: skip
    if dtype is not torch.float32 or not sequences:
        return row
    if any(rule.input is not None for rule in checkpoint.recipe.rules.values()):
        row["max_abs_logit_diff_own_inputs"] = logits(model, sequences)["max_abs_logit_diff"]
        row["load_path"] += ", its inputs rounded by us"
        _replace_inputs(model, checkpoint)
    if checkpoint.recipe.kv is not None:
        row["load_path"] += ", its cache replaced by ours"
        _replace_cache(model, checkpoint.recipe.kv)
    return row | logits(model, sequences, compared_in(checkpoint.recipe))


def logits(model: Any, sequences: list[Sequence], dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Largest difference of a model's logits in `dtype` from the reference's, and the largest reference logit."""
    worst = largest = 0.0
    with computing(dtype):
        for sequence in sequences:
            out = model(input_ids=sequence.ids[None, :-1], use_cache=False).logits[0].float()
            worst = max(worst, difference(out, sequence.logits))
            largest = max(largest, float(sequence.logits.abs().max()))
    return {"max_abs_logit_diff": worst, "max_abs_logit": largest}


def _replace_inputs(model: Any, checkpoint: Checkpoint) -> None:
    """compressed-tensors rounds inputs too, but dynamic ones with its own scales, and static ones in the dtype of x."""
    for module in model.modules():
        if hasattr(module, "quantization_scheme"):
            module.quantization_enabled = False
    quantize_inputs(model, checkpoint.recipe, dict(checkpoint.plain))


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
