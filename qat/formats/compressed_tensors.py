"""compressed-tensors `pack-quantized`: integer weights of 2 to 8 bits, as vLLM, SGLang and transformers read them.

For each quantized module (all row-major, codes and zero points stored with `2**(bits-1)` added, dense bitstream):

    weight_packed      int32  [O, ceil(I * bits / 32)]     packed along I
    weight_scale       storage dtype, of the scheme's scale shape
    weight_shape       int64  [2] = [O, I]
    weight_zero_point  int32  [ceil(O * bits / 32), G]     packed along O; asymmetric schemes only

Symmetric checkpoints must not hold a zero point: vLLM refuses them.

A packed embedding is read here, and decoded by the library, but not written: transformers 5.23 cannot load one unless
it is asked to dequantize, and then only where the whole file has one scheme.

A KV cache with a scale for each token and head stores nothing but its scheme, `kv_cache_scheme`: dynamic, in groups of
head_dim elements (`token` would be one scale for all tokens of a head, as the library computes it). No key says how an
integer scale follows from absmax: here it is absmax / 127, where the library divides by 127.5. vLLM reads none but
static FP8 from a file, and refuses these by name.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
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
    linear_names,
    read_json,
    recipe_of,
    unquantized_state,
    write_directory,
)
from qat.numerics.affine import scale_dtype
from qat.numerics.granularity import Granularity, PerChannel, PerGroup, PerTensor
from qat.numerics.grid import IntGrid
from qat.numerics.kv import KINDS, head_dim, kind_of
from qat.numerics.packing import num_words, offset, pack, unpack
from qat.numerics.qtensor import QuantizedTensor, as_integers
from qat.numerics.recipe import Recipe
from qat.numerics.scheme import E4M3, E8M0, Scheme, integers

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
LAYOUT_VERSION = "0.20.0"  # the dense bitstream; releases before 0.18 left gaps at 3, 5, 6 and 7 bits
PARTS = ("weight_packed", "weight_scale", "weight_shape", "weight_zero_point")


def check_scheme(name: str, weight: Scheme, input: Scheme | None = None, kind: str = "Linear") -> None:
    """Raises ValueError, naming the module, if the format cannot carry a scheme, or a module of that class."""
    if kind == "Embedding":
        raise ValueError(
            f"{name}: transformers does not load a packed embedding from {FORMAT}, so it cannot be exported. Use "
            f"format=none, or add a later rule that matches it, with weight=null"
        )
    if input is not None:
        raise ValueError(
            f"{name}: {FORMAT} carries weights only; its input scheme {input} cannot be exported. Use format=none"
        )
    if not isinstance(integers(weight).grid, IntGrid) or integers(weight).scale_dtype in (E4M3, E8M0):
        raise ValueError(f"{name}: {FORMAT} carries integers only; {weight} cannot be exported. Use format=none")
    if weight.dynamic:
        raise ValueError(f"{name}: a dynamic scale is never stored; set dynamic=false on the weight's scheme")
    if isinstance(weight.granularity, PerTensor) and not weight.symmetric:
        raise ValueError(f"{name}: {FORMAT} packs zero points per channel or group only; use symmetric=true")


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
    for name, tensor in tensors.items():
        hit = recipe.rule_for(name)
        if hit is None or hit[1].weight != tensor.scheme:
            raise ValueError(f"{name}: quantized as {tensor.scheme}, but the recipe says {hit and hit[1].weight}")
        check_scheme(name, tensor.scheme, hit[1].input, type(model.get_submodule(name)).__name__)
        if tensor.scale.dtype != scale_dtype(tensor.scheme, dtype):
            raise ValueError(f"{name}: scale in {tensor.scale.dtype}, but the storage dtype is {dtype}")
    config = quantization_config(tensors, linear_names(model))
    config["kv_cache_scheme"] = None if recipe.kv is None else kv_args(recipe.kv, head_dim(model.config.to_dict()))
    write_directory(Path(path), model, tokenizer, state(model, tensors, folded, dtype), config, dtype)


def expressed(recipe: Recipe, tensors: Mapping[str, QuantizedTensor]) -> tuple[Recipe, dict[str, QuantizedTensor]]:
    """Recipe and tensors as the format says them: codebooks of integers on the integer grid that holds their levels."""
    rules = {
        key: replace(rule, weight=None if rule.weight is None else integers(rule.weight))
        for key, rule in recipe.rules.items()
    }
    return replace(recipe, rules=rules), {name: as_integers(tensor) for name, tensor in tensors.items()}


def state(
    model: PreTrainedModel, tensors: Mapping[str, QuantizedTensor], folded: Mapping[str, Tensor], dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of the file by name: packed weights, and everything else in the storage dtype."""
    result = unquantized_state(model, tensors, folded, dtype)
    for name, tensor in tensors.items():
        result |= {f"{name}.{part}": value for part, value in pack_tensor(tensor).items()}
    return result


def pack_tensor(tensor: QuantizedTensor) -> dict[str, Tensor]:
    """A quantized weight as the format's tensors, on the CPU; packed where it lies."""
    bits = tensor.scheme.grid.bits
    parts = {
        "weight_packed": pack(tensor.codes.to(torch.int16) + offset(bits), bits).cpu(),
        "weight_scale": tensor.scale.cpu().contiguous(),
        "weight_shape": torch.tensor(tensor.shape, dtype=torch.int64),
    }
    if tensor.zero_point is not None:
        unsigned = tensor.zero_point.to(torch.int16) + offset(bits)
        parts["weight_zero_point"] = pack(unsigned.T, bits).T.contiguous().cpu()
    return parts


def unpack_tensor(name: str, parts: Mapping[str, Tensor], scheme: Scheme) -> QuantizedTensor:
    """The inverse of `pack_tensor`.

    Raises:
        ValueError: A part has the wrong shape or dtype, or a scale is not a positive number.
    """
    if (found := parts["weight_shape"]).numel() != 2 or found.dtype != torch.int64:
        raise ValueError(f"{name}.weight_shape: expected two int64, found {found.dtype} {tuple(found.shape)}")
    rows, columns = (int(n) for n in found)
    bits, packed, scale = scheme.grid.bits, parts["weight_packed"], parts["weight_scale"]
    if packed.dtype != torch.int32 or tuple(packed.shape) != (rows, num_words(columns, bits)):
        raise ValueError(
            f"{name}.weight_packed: {packed.dtype} {tuple(packed.shape)}; {bits}-bit [{rows}, {columns}] needs "
            f"torch.int32 {(rows, num_words(columns, bits))}"
        )
    shape = scheme.granularity.scale_shape((rows, columns))
    if tuple(scale.shape) != shape or not scale.is_floating_point():
        raise ValueError(f"{name}.weight_scale: {scale.dtype} {tuple(scale.shape)}, expected {shape}")
    if not bool((torch.isfinite(scale) & (scale > 0)).all()):
        raise ValueError(f"{name}.weight_scale: a scale is zero, negative or not finite")
    zero_point = None
    if not scheme.symmetric:
        words = parts["weight_zero_point"]
        if words.dtype != torch.int32 or tuple(words.shape) != (num_words(rows, bits), shape[1]):
            raise ValueError(f"{name}.weight_zero_point: {words.dtype} {tuple(words.shape)}")
        unsigned = unpack(words.T.contiguous(), bits, rows).T
        zero_point = (unsigned.to(torch.int16) - offset(bits)).to(torch.int8).contiguous()
    codes = (unpack(packed, bits, columns).to(torch.int16) - offset(bits)).to(torch.int8)
    return QuantizedTensor(codes, scale, zero_point, scheme, (rows, columns))


def quantization_config(tensors: Mapping[str, QuantizedTensor], linears: list[str]) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    One scheme: one group that targets `Linear`, with every other linear in `ignore`. Several: a group for each, which
    names its modules.
    """
    by_scheme: dict[Scheme, list[str]] = {}
    for name, tensor in tensors.items():
        by_scheme.setdefault(tensor.scheme, []).append(name)
    groups = {
        f"group_{i}": {
            "targets": ["Linear"] if len(by_scheme) == 1 else names,
            "format": FORMAT,
            "input_activations": None,
            "output_activations": None,
            "weights": weights_args(scheme),
        }
        for i, (scheme, names) in enumerate(by_scheme.items())
    }
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "version": LAYOUT_VERSION,
        "ignore": [name for name in linears if name not in tensors],
        "kv_cache_scheme": None,
        "config_groups": groups,
    }


def weights_args(scheme: Scheme) -> dict[str, Any]:
    """A scheme in the format's words."""
    strategy = {PerTensor: "tensor", PerChannel: "channel", PerGroup: "group"}[type(scheme.granularity)]
    return {
        "num_bits": scheme.grid.bits,
        "type": "int",
        "symmetric": scheme.symmetric,
        "strategy": strategy,
        "group_size": getattr(scheme.granularity, "group_size", None),
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
    }


def kv_args(kv: Scheme, size: int) -> dict[str, Any]:
    """A KV cache's scheme in the format's words, for heads of `size` elements.

    Raises:
        ValueError: It is none that a cache can have.
    """
    number = "int" if kind_of(kv).startswith("int") else "float"
    return {
        "num_bits": kv.grid.bits,
        "type": number,
        "symmetric": True,
        "strategy": "group",
        "group_size": size,
        "dynamic": True,
    }


def kv_scheme(written: Any, size: int) -> Scheme:
    """The inverse of `kv_args`.

    Raises:
        ValueError: Another scheme, such as one with static scales.
    """
    for kv in KINDS.values():
        ours = kv_args(kv, size)
        if isinstance(written, dict) and {key: written.get(key) for key in ours} == ours:
            return kv
    raise ValueError(
        f"kv_cache_scheme {written}; this reader serves dynamic {', '.join(KINDS)} with one scale for each token and "
        f"head (strategy group, group_size {size})"
    )


def scheme_of(where: str, group: Mapping[str, Any]) -> Scheme:
    """The scheme of a config group.

    Raises:
        ValueError: The group says something that this reader does not serve.
    """
    weights = group.get("weights") or {}
    if group.get("input_activations") or group.get("output_activations"):
        raise ValueError(f"{where}: quantized activations; this reader serves weight-only checkpoints")
    if group.get("format") not in (None, FORMAT) or weights.get("type") != "int" or weights.get("dynamic"):
        raise ValueError(
            f"{where}: format {group.get('format')!r}, type {weights.get('type')!r}; expected {FORMAT}, int"
        )
    strategy, bits, size = (weights.get(key) for key in ("strategy", "num_bits", "group_size"))
    if not isinstance(bits, int):
        raise ValueError(f"{where}: num_bits {bits!r}; expected an integer")
    symmetric = weights.get("symmetric", True)
    if not isinstance(symmetric, bool):
        raise ValueError(f"{where}: symmetric {symmetric!r}; expected true or false")
    granularity: Granularity
    if strategy == "group":
        if not isinstance(size, int):
            raise ValueError(f"{where}: group_size {size!r}; expected an integer")
        granularity = PerGroup(size)
    elif strategy in ("channel", "tensor"):
        granularity = PerChannel() if strategy == "channel" else PerTensor()
    else:
        raise ValueError(f"{where}: strategy {strategy!r}; expected group, channel or tensor")
    return Scheme(IntGrid(bits), granularity, symmetric=symmetric)


def load(path: Path | str) -> Checkpoint:
    """Opens a checkpoint directory; tensors are read, and checked, when they are asked for.

    Where a certificate lies beside the weights, each tensor is held to its digests.

    Raises:
        ValueError: The directory is incomplete or damaged, or holds another format; the message names tensor and file.
    """
    path = Path(path)
    config = read_json(path / "config.json")
    quantization = config.get("quantization_config") or {}
    if (method := quantization.get("quant_method")) != METHOD or quantization.get("format") not in (FORMAT, None):
        found = f"{method!r} {quantization.get('format', '')}".strip()
        raise ValueError(f"{path}: quantized by {found}; this reader serves {METHOD} {FORMAT}")
    for key in ("transform_config", "sparsity_config"):
        if quantization.get(key):
            raise ValueError(f"{path}/config.json: {key} is set; this reader serves quantized weights alone")
    if (kv := quantization.get("kv_cache_scheme")) is not None:
        try:
            kv = kv_scheme(kv, head_dim(config))
        except ValueError as error:
            raise ValueError(f"{path}/config.json: {error}") from None
    reader = Reader(path)
    modules = [name.removesuffix(".weight_packed") for name in reader.files if name.endswith(".weight_packed")]
    if missing := [name for name in modules if f"{name}.weight_scale" not in reader.files]:
        raise ValueError(f"{path}: tensor {missing[0]}.weight_scale is missing")
    storage = config.get("dtype") or config.get("torch_dtype")
    schemes = {}
    for name, scheme in module_schemes(path, quantization, modules).items():
        stored = reader.dtype(f"{name}.weight_scale")
        schemes[name] = replace(scheme, scale_dtype=None if stored == storage else stored)
    parts = {f"{m}.{p}" for m, s in schemes.items() for p in (PARTS if not s.symmetric else PARTS[:3])}
    if strays := [n for n in reader.files if n.rpartition(".")[2] in PARTS and n not in parts]:
        raise ValueError(f"{reader.files[strays[0]]}: tensor {strays[0]} belongs to no quantized module")
    if lost := sorted(parts - set(reader.files)):
        raise ValueError(f"{path}: tensor {lost[0]} is missing")

    def read(name: str) -> QuantizedTensor:
        wanted = PARTS if not schemes[name].symmetric else PARTS[:3]
        try:
            tensor = unpack_tensor(name, {p: reader.raw(f"{name}.{p}") for p in wanted}, schemes[name])
        except ValueError as error:
            raise ValueError(f"{reader.files[f'{name}.weight_packed']}: {error}") from None
        reader.check(certified_parts(name, tensor), name)
        return tensor

    plain = [name for name in reader.files if name not in parts]
    recipe = replace(recipe_of(schemes), kv=kv)
    return Checkpoint(path, config, recipe, Lazy(modules, read), Lazy(plain, reader.plain), reader.files)


def module_schemes(path: Path, quantization: Mapping[str, Any], modules: list[str]) -> dict[str, Scheme]:
    """The scheme of every packed module: groups that name it win over groups that target its class."""
    groups = quantization.get("config_groups") or {}
    schemes = {key: scheme_of(f"{path}/config.json: {key}", group) for key, group in groups.items()}
    result = {}
    for name in modules:
        hits = [
            key for key, group in groups.items() if any(_targets(target, name) for target in group.get("targets", ()))
        ]
        kind = "Embedding" if "embed" in name.rpartition(".")[2] else "Linear"
        hits = hits or [key for key, group in groups.items() if kind in group.get("targets", ())]
        if not hits:
            raise ValueError(f"{path}/config.json: no config group speaks of the packed module {name}")
        result[name] = schemes[hits[0]]
    return result


def _targets(target: str, name: str) -> bool:
    return re.match(target[3:], name) is not None if target.startswith("re:") else target == name
