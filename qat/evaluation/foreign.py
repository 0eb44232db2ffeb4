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
from qat.evaluation.reference import Sequence, difference
from qat.formats import awq, compressed_tensors, gguf, gptq
from qat.formats.base import Checkpoint
from qat.models.gguf_names import row_order, their_name
from qat.models.hf import load_gguf, load_quantized
from qat.nn.kv import quantize_kv
from qat.numerics.scheme import Scheme

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
    rows = {"compressed_tensors": library(checkpoint)}
    rows["transformers_default"] = transformers(checkpoint, None, [])
    symmetric = all(rule.weight is None or rule.weight.symmetric for rule in checkpoint.recipe.rules.values())
    if symmetric:  # loaded asymmetrically, transformers decodes in bf16 first: no fp32 view exists
        rows["transformers_fp32"] = transformers(checkpoint, torch.float32, sequences)
    return rows, []


def library(checkpoint: Checkpoint) -> Row:
    """Decodes every packed weight with the compressed-tensors library, and compares it with our own decoding.

    Both in the dtype of the scales. The file's own config groups say how, so this checks them as well.
    """
    groups = checkpoint.config["quantization_config"]["config_groups"].values()

    def decode(name: str) -> Tensor:
        group = next(g for g in groups if name in g["targets"] or "Linear" in g["targets"])
        return _decompressed(compressed_tensors.pack_tensor(checkpoint.tensors[name]), QuantizationScheme(**group))

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


def _worst(model: Any, checkpoint: Checkpoint) -> tuple[float, str | None]:
    """The largest difference of a foreign model's tensors from our own decoding, in the model's dtypes, and where."""
    own = dict(model.named_parameters()) | dict(model.named_buffers())
    worst: tuple[float, str | None] = (0.0, None)
    for name, tensor in checkpoint.tensors.items():
        weight = own.pop(f"{name}.weight", torch.empty(0))
        worst = max(worst, (_difference(weight, tensor.dequantize(weight.dtype)), name), key=_first)
    for name, value in checkpoint.plain.items():
        found = own.pop(name, torch.empty(0))
        worst = max(worst, (_difference(found, value.to(found.dtype)), name), key=_first)
    return worst


def _decompressed(parts: dict[str, Tensor], scheme: QuantizationScheme) -> Tensor:
    compressor = BaseCompressor.get_value_from_registry(compressed_tensors.FORMAT)
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


@torch.no_grad()
def transformers(checkpoint: Checkpoint, dtype: torch.dtype | None, sequences: list[Sequence]) -> Row:
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
    worst, where = _worst(model, checkpoint)
    path = "AutoModelForCausalLM.from_pretrained" + (
        "" if symmetric else " with CompressedTensorsConfig(dequantize=True)"
    )
    compares = dtype is torch.float32 and bool(sequences)
    if compares and checkpoint.recipe.kv is not None:
        path += ", its cache replaced by ours"
        _replace_cache(model, checkpoint.recipe.kv)
    row: Row = {
        "load_path": path, "dtype": str(model.dtype).removeprefix("torch."), "max_abs_diff": worst, "worst": where
    }  # fmt: skip
    return row | logits(model, sequences, compared_in(checkpoint.recipe)) if compares else row


def logits(model: Any, sequences: list[Sequence], dtype: torch.dtype = torch.float32) -> Row:
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
