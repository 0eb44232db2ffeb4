"""compressed-tensors: quantized weights and inputs, as vLLM, SGLang and transformers read them.

`ct_args.py` says which sub-format carries what, and in which words; `ct_parts.py` has the tensors of each. Modules of
several sub-formats may lie in one file, whose format is then `mixed-precision`.

An embedding is read here, and decoded by the library, but not written: transformers 5.23 cannot load a packed one
unless it is asked to dequantize, and then only where the whole file has one scheme.

A KV cache with a scale for each token and head stores nothing but its scheme, `kv_cache_scheme`: dynamic, in groups of
head_dim elements (`token` would be one scale for all tokens of a head, as the library computes it). No key says how an
integer scale follows from absmax: here it is absmax / 127, where the library divides by 127.5. vLLM reads none but
static FP8 from a file, and refuses these by name.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qat.formats.base import (
    Checkpoint,
    Lazy,
    Reader,
    certified_parts,
    check_only_weight,
    check_tensors,
    linear_names,
    read_json,
    recipe_of,
    unquantized_state,
    write_directory,
)
from qat.formats.base import expressed as expressed
from qat.formats.ct_args import (
    MIXED,
    PACKED,
    SUB_FORMATS,
    Schemes,
    config_groups,
    has_g_idx,
    kv_args,
    kv_scheme,
    refused,
    schemes_of,
    sub_format,
)
from qat.formats.ct_parts import PARTS, check_input, pack_tensor, part_names, unpack_tensor
from qat.numerics.affine import scale_dtype
from qat.numerics.kv import head_dim
from qat.numerics.qtensor import QuantizedTensor
from qat.numerics.recipe import Recipe
from qat.numerics.scheme import E4M3, E8M0, INPUT_PARTS, Scheme, input_parts

METHOD = "compressed-tensors"
LAYOUT_VERSION = "0.20.0"  # the dense bitstream; releases before 0.18 left gaps at 3, 5, 6 and 7 bits
CODES = ("int8", "float8_e4m3fn")  # dtypes of a `weight` that is quantized


@dataclass(frozen=True)
class Stored:
    """How a module of the file is quantized, its sub-format, and whether it has a g_idx."""

    format: str
    weight: Scheme
    input: Scheme | None
    reordered: bool

    @property
    def parts(self) -> tuple[str, ...]:
        """The tensors of its weight."""
        return part_names(self.weight, self.format == PACKED, self.reordered)


def check_scheme(name: str, weight: Scheme, input: Scheme | None = None, kind: str = "Linear") -> None:
    """Raises ValueError, naming the module, if the format cannot carry a scheme, or a module of that class."""
    if kind == "Embedding":
        raise ValueError(
            f"{name}: transformers does not load a packed embedding from {METHOD}, so it cannot be exported. Use "
            f"format=none, or add a later rule that matches it, with weight=null"
        )
    if weight.dynamic:
        raise ValueError(f"{name}: a dynamic scale is never stored; set dynamic=false on the weight's scheme")
    for _, text in refused(weight, input):
        raise ValueError(f"{name}: {METHOD} {text}")


def save(
    path: Path | str,
    model: PreTrainedModel,
    recipe: Recipe,
    tensors: Mapping[str, QuantizedTensor],
    folded: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Writes a complete Hugging Face directory with packed weights, replacing `path` whole or not at all.

    Args:
        path: Directory to write.
        model: The full-precision model: its config, and every tensor that neither `tensors` nor `folded` holds.
        recipe: What the codes were found under; each tensor's scheme must be the one that its rule names.
        tensors: Module name to quantized weight.
        folded: Parameter name to the unquantized tensor that replaces the model's.
        tokenizer: Saved beside the weights, chat template included.
        dtype: Storage dtype of scales and unquantized tensors.

    Raises:
        ValueError: The format cannot carry a scheme, or a tensor does not fit the storage dtype.
    """
    check_tensors(model, recipe, tensors, check_scheme, dtype)
    for name, tensor in tensors.items():
        _check_input(name, _input(recipe, name), folded, dtype)
        if tensor.g_idx is not None and sub_format(tensor.scheme, _input(recipe, name)) != PACKED:
            raise ValueError(
                f"{name}: {METHOD} has a g_idx in {PACKED} alone; quantize it with act_order=group or static"
            )
    config = quantization_config(recipe, tensors, linear_names(model))
    config["kv_cache_scheme"] = None if recipe.kv is None else kv_args(recipe.kv, head_dim(model.config.to_dict()))
    write_directory(Path(path), model, tokenizer, state(model, recipe, tensors, folded, dtype), config, dtype)


def _check_input(name: str, input: Scheme | None, folded: Mapping[str, Tensor], dtype: torch.dtype) -> None:
    found, wanted = {part for part in INPUT_PARTS if f"{name}.{part}" in folded}, set(input_parts(input))
    if found != wanted:
        part, how = next(iter(found ^ wanted)), "is stored" if found - wanted else "is missing"
        raise ValueError(f"{name}: its input scheme is {input}, but {name}.{part} {how}; calibrate under this recipe")
    stored = folded[f"{name}.input_scale"].dtype if "input_scale" in found else None
    if stored is not None and input is not None and stored != scale_dtype(input, dtype):
        raise ValueError(f"{name}: input_scale in {stored}, but the storage dtype is {dtype}")


def state(
    model: PreTrainedModel,
    recipe: Recipe,
    tensors: Mapping[str, QuantizedTensor],
    folded: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The tensors of the file by name: quantized weights, scales of inputs, and the rest in the storage dtype."""
    result, reordered = unquantized_state(model, tensors, folded, dtype), _reordered(recipe, tensors)
    for name, tensor in tensors.items():
        schemes = tensor.scheme, _input(recipe, name)
        parts = pack_tensor(tensor, sub_format(*schemes) == PACKED, schemes in reordered)
        result |= {f"{name}.{part}": value for part, value in parts.items()}
    return result


def _reordered(recipe: Recipe, tensors: Mapping[str, QuantizedTensor]) -> set[Schemes]:
    """Schemes of which a module has a g_idx; then all of these schemes do: one word of the config speaks of them."""
    return {(tensor.scheme, _input(recipe, name)) for name, tensor in tensors.items() if tensor.g_idx is not None}


def quantization_config(
    recipe: Recipe, tensors: Mapping[str, QuantizedTensor], linears: Iterable[str]
) -> dict[str, Any]:
    """The `quantization_config` of config.json; every linear that is not quantized is in `ignore`."""
    by_schemes: dict[Schemes, list[str]] = {}
    for name, tensor in tensors.items():
        by_schemes.setdefault((tensor.scheme, _input(recipe, name)), []).append(name)
    return {
        "quant_method": METHOD,
        "quantization_status": "compressed",
        "version": LAYOUT_VERSION,
        "ignore": [name for name in linears if name not in tensors],
        "kv_cache_scheme": None,
        **config_groups(by_schemes, _reordered(recipe, tensors)),
    }


def _input(recipe: Recipe, name: str) -> Scheme | None:
    hit = recipe.rule_for(name)
    return None if hit is None else hit[1].input


def load(path: Path | str) -> Checkpoint:
    """Opens a checkpoint directory; tensors are read, and checked, when they are asked for.

    Where a certificate lies beside the weights, each tensor is held to its digests.

    Raises:
        ValueError: The directory is incomplete or damaged, or holds another format; the message names tensor and file.
    """
    path = Path(path)
    config = read_json(path / "config.json")
    quantization, kv = _opened(path, config)
    reader = Reader(path)
    modules = quantized_modules(reader)
    storage = config.get("dtype") or config.get("torch_dtype")
    stored = {
        name: Stored(how.format, *_with_dtypes(reader, name, how, storage), how.reordered)
        for name, how in module_schemes(path, quantization, modules).items()
    }
    parts = {f"{name}.{part}" for name, how in stored.items() for part in how.parts}
    inputs = {f"{name}.{part}": how.input for name, how in stored.items() for part in input_parts(how.input)}
    owned = {*PARTS, *INPUT_PARTS} - {"weight"}
    if strays := [n for n in reader.files if n.rpartition(".")[2] in owned and n not in parts and n not in inputs]:
        raise ValueError(f"{reader.files[strays[0]]}: tensor {strays[0]} belongs to no module that is quantized so")
    for name, how in stored.items():
        if "weight" not in how.parts:
            check_only_weight(reader, name)
    if lost := sorted((parts | set(inputs)) - set(reader.files)):
        raise ValueError(f"{path}: tensor {lost[0]} is missing")

    def read(name: str) -> QuantizedTensor:
        how = stored[name]
        try:
            raw = {part: reader.raw(f"{name}.{part}") for part in how.parts}
            tensor = unpack_tensor(name, raw, how.weight, how.format == PACKED)
        except ValueError as error:
            raise ValueError(f"{reader.files[f'{name}.{how.parts[0]}']}: {error}") from None
        reader.check(certified_parts(name, tensor), name)
        return tensor

    def read_plain(name: str) -> Tensor:
        tensor = reader.plain(name)
        if (scheme := inputs.get(name)) is not None:
            try:
                check_input(name, tensor, scheme)
            except ValueError as error:
                raise ValueError(f"{reader.files[name]}: {error}") from None
        return tensor

    plain = [name for name in reader.files if name not in parts]
    recipe = recipe_of({name: (how.weight, how.input) for name, how in stored.items()}, kv)
    return Checkpoint(path, config, recipe, Lazy(modules, read), Lazy(plain, read_plain), reader.files)


def _opened(path: Path, config: Mapping[str, Any]) -> tuple[dict[str, Any], Scheme | None]:
    """The `quantization_config`, if it is one of this format that is served, and the scheme of the KV cache."""
    quantization = config.get("quantization_config") or {}
    method, named = quantization.get("quant_method"), quantization.get("format")
    if method != METHOD or named not in (None, MIXED, *SUB_FORMATS):
        found = f"{method!r} {named or ''}".strip()
        raise ValueError(f"{path}: quantized by {found}; this reader serves {METHOD}: {', '.join(SUB_FORMATS)}")
    for key in ("transform_config", "sparsity_config"):
        if quantization.get(key):
            raise ValueError(f"{path}/config.json: {key} is set; this reader serves quantized weights and inputs alone")
    if (kv := quantization.get("kv_cache_scheme")) is None:
        return quantization, None
    try:
        return quantization, kv_scheme(kv, head_dim(config))
    except ValueError as error:
        raise ValueError(f"{path}/config.json: {error}") from None


def quantized_modules(reader: Reader) -> list[str]:
    """The modules whose weight is packed, or a matrix of codes."""
    packed = (name.removesuffix("_packed") for name in reader.files if name.endswith(".weight_packed"))
    codes = (name for name in reader.files if name.endswith(".weight") and reader.dtype(name) in CODES)
    return [name.removesuffix(".weight") for name in dict.fromkeys((*packed, *codes))]


def module_schemes(path: Path, quantization: Mapping[str, Any], modules: list[str]) -> dict[str, Stored]:
    """What the file says of every quantized module: groups that name it win over groups that target its class."""
    groups = quantization.get("config_groups") or {}
    stored = {}
    for key, group in groups.items():
        where = f"{path}/config.json: {key}"
        name, weight, input = schemes_of(where, key, quantization)
        stored[key] = Stored(name, weight, input, has_g_idx(where, group, name))
    named = quantization.get("format")
    if wrong := [key for key, how in stored.items() if named not in (None, MIXED, how.format)]:
        raise ValueError(f"{path}/config.json: format {named!r}, but {wrong[0]} is {stored[wrong[0]].format}")
    result = {}
    for name in modules:
        hits = [
            key for key, group in groups.items() if any(_targets(target, name) for target in group.get("targets", ()))
        ]
        kind = "Embedding" if "embed" in name.rpartition(".")[2] else "Linear"
        hits = hits or [key for key, group in groups.items() if kind in group.get("targets", ())]
        if not hits:
            raise ValueError(f"{path}/config.json: no config group speaks of the packed module {name}")
        result[name] = stored[hits[0]]
    return result


def _targets(target: str, name: str) -> bool:
    return re.match(target[3:], name) is not None if target.startswith("re:") else target == name


def _with_dtypes(reader: Reader, name: str, how: Stored, storage: str | None) -> Schemes:
    """Its schemes with the dtypes that the scales of this module have in the file."""

    def told(scheme: Scheme, tensor: str) -> Scheme:
        if scheme.scale_dtype in (E4M3, E8M0) or tensor not in reader.files:
            return scheme
        stored = reader.dtype(tensor)
        try:
            return replace(scheme, scale_dtype=None if stored == storage else stored)
        except ValueError as error:
            raise ValueError(f"{reader.files[tensor]}: {tensor}: {error}") from None

    weight, input = told(how.weight, f"{name}.weight_scale"), how.input
    if input is not None and not input.dynamic:
        input = told(input, f"{name}.input_scale")
    return weight, input
