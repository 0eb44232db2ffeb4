"""What other people's loaders make of an export: every weight, bit for bit, and the logits."""

from collections.abc import Callable
from typing import Any

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.entrypoints.convert import AutoAWQConverter
from compressed_tensors.modeling.kvcache import KV_CACHE_ATTR
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from gguf import dequantize
from safetensors import safe_open
from torch import Tensor

from qat.evaluation.precision import compared_in, computing
from qat.evaluation.reference import Sequence, compared
from qat.formats import awq, gguf, gptq
from qat.formats.base import Checkpoint
from qat.formats.ct_args import PACKED, REORDERED, REORDERED_TOO, sub_format
from qat.formats.ct_parts import pack_tensor
from qat.models.gguf_names import row_order, their_name
from qat.models.hf import load_gguf, load_quantized
from qat.nn.kv import quantize_kv
from qat.numerics.recipe import Recipe
from qat.numerics.scheme import E4M3, E8M0, Scheme, is_input_scale
from qat.surgery.convert import quantize_inputs

DECODERS = ("compressed_tensors", "transformers_default", "autoawq_converter", "gguf", "transformers_gguf")
Row = dict[str, Any]


def decoders(checkpoint: Checkpoint, sequences: list[Sequence]) -> tuple[dict[str, Row], list[str]]:
    """What every installed loader of the checkpoint's format makes of it, and what none here can say.

    Returns:
        Load path, dtype and largest difference of each; and sentences, where no loader is installed.
    """
    method = checkpoint.config["quantization_config"]["quant_method"]
    if method == gptq.METHOD:
        return {}, ["foreign decode: no library here decodes GPTQ's layout (GPTQModel and vLLM do)"]
    if method == awq.METHOD:
        return {"autoawq_converter": converter(checkpoint)}, []
    if method == gguf.METHOD:
        return {"gguf": package(checkpoint), "transformers_gguf": transformers_gguf(checkpoint, sequences)}, []
    groups = checkpoint.config["quantization_config"]["config_groups"].values()
    if any(group["weights"].get("actorder") in (REORDERED, *REORDERED_TOO) for group in groups):
        text = "compressed-tensors reads no actorder=group since 0.19, nor does transformers with it (0.18 and vLLM do)"
        return {"compressed_tensors_in_order": library(checkpoint)}, [f"foreign decode: {text}"]
    rows, unchecked = {"compressed_tensors": library(checkpoint)}, []
    if loads(checkpoint.recipe):
        rows["transformers_default"] = transformers(checkpoint, None, [])
    else:
        unchecked.append("transformers: it loads no packed zero points beside weights of another scheme")
    if decodes_in_fp32(checkpoint.recipe):
        rows["transformers_fp32"] = transformers(checkpoint, torch.float32, sequences)
    return rows, unchecked


def library(checkpoint: Checkpoint) -> Row:
    """Decodes every quantized weight with the compressed-tensors library, and compares it with our own decoding.

    Both in the dtype that the library decodes to. The file's own config groups say how, so this checks them as well.
    Groups that are not of consecutive in-features are put in order first: the library knows no g_idx any more, so of
    such a file it checks codes, scales and zero points, and not where they belong.
    """
    quantization = checkpoint.config["quantization_config"]
    groups = [g | {"weights": g["weights"] | {"actorder": None}} for g in quantization["config_groups"].values()]

    def decode(name: str) -> Tensor:
        group = next(g for g in groups if name in g["targets"] or "Linear" in g["targets"])
        named = group.get("format") or quantization["format"]
        tensor = checkpoint.tensors[name]
        decoded = _decompressed(pack_tensor(tensor.in_order(), named == PACKED), QuantizationScheme(**group), named)
        return decoded if tensor.order is None else decoded[:, tensor.order.argsort()]

    return _compared(checkpoint, "compressed_tensors BaseCompressor.decompress", decode)


def converter(checkpoint: Checkpoint) -> Row:
    """Decodes every packed weight of an AWQ file with the compressed-tensors library's converter, likewise.

    It reads the file's own tensors and config. Its own config has no word for scales per channel, which are groups of
    the whole row.
    """
    said = checkpoint.config["quantization_config"]
    own = AutoAWQConverter.from_autoawq_config(said)

    def decode(name: str) -> Tensor:
        raw = {}
        for part in awq.PARTS:
            with safe_open(checkpoint.files[f"{name}.{part}"], framework="pt") as file:
                raw[f"{name}.{part}"] = file.get_tensor(f"{name}.{part}")
        parts = {key.removeprefix(f"{name}."): value for key, value in own.process(raw).items()}
        columns = checkpoint.tensors[name].shape[1]
        size = said["group_size"] if said["group_size"] > 0 else columns
        weights = QuantizationArgs(num_bits=own.bits, symmetric=not own.zero_point, strategy="group", group_size=size)
        return _decompressed(parts, QuantizationScheme(targets=["Linear"], weights=weights))

    return _compared(checkpoint, "compressed_tensors AutoAWQConverter, BaseCompressor.decompress", decode)


def package(checkpoint: Checkpoint) -> Row:
    """Decodes every packed weight of a GGUF file with the `gguf` package, and compares it with ours, in fp32."""
    stored = {tensor.name: tensor for tensor in gguf.tensors_of(checkpoint.path / gguf.FILE)}

    def decode(name: str) -> Tensor:
        tensor = stored[their_name(f"{name}.weight")]
        decoded = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type))
        order = row_order(name, checkpoint.config)
        return decoded if order is None else decoded[order.argsort()]

    return _compared(checkpoint, "gguf.quants.dequantize", decode)


@torch.no_grad()
def transformers_gguf(checkpoint: Checkpoint, sequences: list[Sequence]) -> Row:
    """Loads a GGUF file with `AutoModelForCausalLM`, and compares every tensor and the reference's logits, in fp32.

    Config and names come from the file's own metadata, not from ours.
    """
    model = load_gguf(checkpoint.path, gguf.FILE)
    worst, where = _worst(model, checkpoint)
    row: Row = {"load_path": f"AutoModelForCausalLM.from_pretrained(gguf_file={gguf.FILE!r})", "dtype": "float32"}
    row |= {"max_abs_diff": worst, "worst": where}
    return row | logits(model, sequences) if sequences else row


def _worst(model: Any, checkpoint: Checkpoint, inputs: bool = True) -> tuple[float, str | None]:
    """The largest difference of a foreign model's tensors from our own decoding, in the model's dtypes, and where.

    `inputs`: whether the model has the scales of quantized inputs.
    """
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    worst: tuple[float, str | None] = (0.0, None)
    for name, tensor in checkpoint.tensors.items():
        weight = own.pop(f"{name}.weight", torch.empty(0))
        worst = max(worst, (_difference(weight, tensor.dequantize(weight.dtype)), name), key=_first)
    for name, value in checkpoint.plain.items():
        if not inputs and is_input_scale(name):
            continue
        found = own.pop(name, torch.empty(0))
        worst = max(worst, (_difference(found, value.to(found.dtype)), name), key=_first)
    return worst


def _decompressed(parts: dict[str, Tensor], scheme: QuantizationScheme, named: str = PACKED) -> Tensor:
    compressor = BaseCompressor.get_value_from_registry(named)
    decoded: Tensor = compressor.decompress(parts, scheme)["weight"]
    return decoded


def _compared(checkpoint: Checkpoint, path: str, decode: Callable[[str], Tensor]) -> Row:
    worst, where, dtypes = 0.0, None, set()
    for name, tensor in checkpoint.tensors.items():
        decoded = decode(name)
        difference = _difference(decoded, tensor.dequantize(decoded.dtype))
        dtypes.add(str(decoded.dtype).removeprefix("torch."))
        if difference > worst:
            worst, where = difference, name
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
def transformers(checkpoint: Checkpoint, dtype: torch.dtype | None, sequences: list[Sequence]) -> Row:
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
    worst, where = _worst(model, checkpoint, inputs=not dequantize)  # asked to dequantize, it quantizes no inputs
    path = "AutoModelForCausalLM.from_pretrained" + (
        " with CompressedTensorsConfig(dequantize=True)" if dequantize else ""
    )
    row: Row = {
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


def logits(model: Any, sequences: list[Sequence], dtype: torch.dtype = torch.float32) -> Row:
    """A model's logits in `dtype`, as `compared` with the reference's."""
    with computing(dtype):
        found = (model(input_ids=s.ids[None, :-1], use_cache=False).logits[0].float() for s in sequences)
        return compared(found, sequences)


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
