"""GPTQ's layout (`quant_method: gptq`): integer weights of 2, 3, 4 and 8 bits, as vLLM, SGLang and GPTQModel read them.

For each quantized module, with unsigned codes u and zeros z (`2**(bits-1)` added to ours), dense bitstreams:

    qweight  int32  [I * bits / 32, O]   packed along I
    qzeros   int32  [G, O * bits / 32]   packed along O
    scales   fp16   [G, O]
    g_idx    int32  [I]                  group of each in-feature

    W[o, i] = scales[g_idx[i], o] * (u[i, o] - z[g_idx[i], o])

`checkpoint_format` is `gptq` (version 1) where every scheme is symmetric: qzeros holds z - 1, so a word of 4-bit zeros
is 0x77777777. Version 1 cannot say z = 0, so a file with an asymmetric module is `gptq_v2`, whose qzeros holds z. There
are files that say one and hold the other: a symmetric one is refused here, by name.

Where a module's g_idx is not i // group_size, `desc_act` is true: vLLM passes over every g_idx where it is false.

Scales are fp16 in what every tool writes and in GPTQModel's buffers, whatever the model's dtype. Those of another
storage dtype are written if fp16 holds each of them, and `meta.scale_dtype` says what they were. Modules that differ
from the first one's scheme, and linears that are not quantized, stand in `dynamic`, as GPTQModel and vLLM read it;
through transformers alone, every linear of the blocks has to be quantized alike.
"""

import json
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
    packed_modules,
    read_json,
    recipe_of,
    unquantized_state,
    write_directory,
    write_safetensors,
)
from qat.formats.base import expressed as expressed
from qat.formats.weight_only import (
    check_static_weight,
    check_weights,
    convention_of,
    from_half,
    in_half,
    meta,
    scale_dtype_of,
)
from qat.numerics.granularity import PerChannel, PerGroup
from qat.numerics.grid import IntGrid
from qat.numerics.packing import num_words, offset, pack, unpack
from qat.numerics.qtensor import QuantizedTensor, as_g_idx, consecutive
from qat.numerics.recipe import Recipe
from qat.numerics.scheme import Scheme, integers

METHOD, V1, V2 = "gptq", "gptq", "gptq_v2"
LESS = {V1: 1, V2: 0}  # what is taken from a zero before it is stored
BITS = (2, 3, 4, 8)
MULTIPLE = 32  # of rows and columns: whole words in both directions at every width
PARTS = ("qweight", "qzeros", "scales", "g_idx")


def check_scheme(name: str, weight: Scheme, input: Scheme | None = None, kind: str = "Linear") -> None:
    """Raises ValueError, naming the module, if the format cannot carry a scheme, or a module of that class."""
    check_static_weight(name, METHOD, weight, input, kind)
    scheme = integers(weight)
    if not isinstance(scheme.grid, IntGrid) or scheme.grid.bits not in BITS:
        raise ValueError(
            f"{name}: {METHOD} carries integers of {', '.join(map(str, BITS))} bits; {weight} cannot be exported"
        )
    if not isinstance(scheme.granularity, PerGroup | PerChannel):
        raise ValueError(f"{name}: {METHOD} has scales per group or channel; {weight} cannot be exported")


def save(
    path: Path | str,
    model: PreTrainedModel,
    recipe: Recipe,
    tensors: Mapping[str, QuantizedTensor],
    folded: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Writes a complete Hugging Face directory, replacing `path` whole or not at all.

    Arguments and dtype as those of `compressed_tensors.save`.

    Raises:
        ValueError: The format cannot carry a scheme, a shape or a scale; or a tensor does not fit the storage dtype.
    """
    check_weights(METHOD, model, recipe, tensors, check_scheme, dtype)
    config = quantization_config(tensors, linear_names(model), dtype)

    def write(part: Path, found: Mapping[str, Tensor]) -> None:
        write_safetensors(part, found)
        (part / "quantize_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")

    write_directory(Path(path), model, tokenizer, state(model, recipe, tensors, folded, dtype), config, dtype, write)


def state(
    model: PreTrainedModel,
    recipe: Recipe,
    tensors: Mapping[str, QuantizedTensor],
    folded: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The tensors of the file by name: packed weights, and everything else in the storage dtype."""
    result, version = unquantized_state(model, tensors, folded, dtype), version_of(tensors)
    for name, tensor in tensors.items():
        result |= {f"{name}.{part}": value for part, value in pack_tensor(name, tensor, version).items()}
    return result


def version_of(tensors: Mapping[str, QuantizedTensor]) -> str:
    """Version 1 where all are symmetric, which most tools read; else version 2, which holds every zero point."""
    return V1 if all(tensor.zero_point is None for tensor in tensors.values()) else V2


def pack_tensor(name: str, tensor: QuantizedTensor, version: str) -> dict[str, Tensor]:
    """A quantized weight as the format's tensors, on the CPU.

    Raises:
        ValueError: Its sizes do not fill words, or fp16 does not hold a scale; names the module.
    """
    bits, (rows, columns) = tensor.scheme.grid.bits, tensor.shape
    if rows % MULTIPLE or columns % MULTIPLE:
        raise ValueError(
            f"{name}: {METHOD} packs multiples of {MULTIPLE} rows and columns; this is [{rows}, {columns}]. Add a "
            f"later rule that matches it, with weight=null"
        )
    zeros = torch.zeros_like(tensor.scale, dtype=torch.int8) if tensor.zero_point is None else tensor.zero_point
    stored = zeros.to(torch.int16) + offset(bits) - LESS[version]
    g_idx = consecutive(columns, tensor.scale.shape[1]) if tensor.g_idx is None else tensor.g_idx
    return {
        "qweight": pack(tensor.codes.to(torch.int16) + offset(bits), bits).T.contiguous().cpu(),
        "qzeros": pack(stored.T, bits).cpu(),
        "scales": in_half(name, tensor.scale).T.contiguous(),
        "g_idx": g_idx.cpu(),
    }


def unpack_tensor(
    name: str, parts: Mapping[str, Tensor], scheme: Scheme, version: str, dtype: torch.dtype
) -> QuantizedTensor:
    """The inverse of `pack_tensor`, with scales in `dtype`.

    Raises:
        ValueError: A part has the wrong shape or dtype, a scale is zero or not finite, groups are not all of one
            size, or zeros are those of the other version.
    """
    qweight, qzeros, scales, g_idx = (parts[part] for part in PARTS)
    if scales.dim() != 2 or g_idx.dim() != 1 or g_idx.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name}.scales: {tuple(scales.shape)} with g_idx {g_idx.dtype} {tuple(g_idx.shape)}")
    bits, rows, columns = scheme.grid.bits, scales.shape[1], len(g_idx)
    try:
        groups = scheme.granularity.scale_shape((rows, columns))[1]
        scale = from_half(scales.T.contiguous(), dtype)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    wanted = {
        "qweight": (num_words(columns, bits), rows),
        "qzeros": (groups, num_words(rows, bits)),
        "scales": (groups, rows),
    }
    for part, shape in wanted.items():
        words = part != "scales" and parts[part].dtype != torch.int32
        if tuple(parts[part].shape) != shape or words:
            found = f"{parts[part].dtype} {tuple(parts[part].shape)}"
            raise ValueError(f"{name}.{part}: {found}; {bits}-bit [{rows}, {columns}] needs {shape}")
    zero_point = zeros_of(name, unpack(qzeros, bits, rows), scheme, version)
    codes = (unpack(qweight.T.contiguous(), bits, columns).to(torch.int16) - offset(bits)).to(torch.int8)
    try:
        return QuantizedTensor(codes, scale, zero_point, scheme, (rows, columns), None, as_g_idx(g_idx, groups))
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from None


def zeros_of(name: str, stored: Tensor, scheme: Scheme, version: str) -> Tensor | None:
    """Signed zero points `[O, G]` of stored ones (uint8 `[G, O]`); None for a symmetric scheme.

    Raises:
        ValueError: They are none that the scheme and the version can have.
    """
    middle, top = offset(scheme.grid.bits), 2**scheme.grid.bits - 1
    if not scheme.symmetric:
        if version == V1 and bool((stored == top).any()):
            raise ValueError(f"{name}.qzeros: {top} in {V1} is a zero of {top + 1} or a wrapped 0; tools disagree")
        return (stored.T.to(torch.int16) - middle + LESS[version]).to(torch.int8).contiguous()
    right = V2 if version == V1 else V1
    expected, other = middle - LESS[version], middle - LESS[right]
    if bool((stored == expected).all()):
        return None
    if bool((stored == other).all()):
        raise ValueError(
            f"{name}.qzeros: all {other}, as {right} stores a symmetric zero, but checkpoint_format says {version}; "
            f"set it to {right} in config.json"
        )
    raise ValueError(f"{name}.qzeros: sym is true, but not every stored zero is {expected}")


def quantization_config(
    tensors: Mapping[str, QuantizedTensor], linears: list[str], dtype: torch.dtype
) -> dict[str, Any]:
    """The `quantization_config` of config.json: the first module's scheme for all, and in `dynamic` what differs."""
    schemes = {name: words(tensor.scheme) for name, tensor in tensors.items()}
    first = next(iter(schemes.values()))
    dynamic: dict[str, Any] = {f"+:^{re.escape(n)}$": said for n, said in schemes.items() if said != first}
    dynamic |= {f"-:^{re.escape(name)}$": {} for name in linears if name not in tensors and name != "lm_head"}
    return {
        "quant_method": METHOD,
        **first,
        "desc_act": any(tensor.g_idx is not None for tensor in tensors.values()),
        "lm_head": "lm_head" in tensors,
        "checkpoint_format": version_of(tensors),
        "pack_dtype": "int32",
        **({"dynamic": dynamic} if dynamic else {}),
        "meta": {"quantizer": ["qat"], **meta(dtype, tensors)},
    }


def words(scheme: Scheme) -> dict[str, Any]:
    """A scheme in the format's words."""
    size = getattr(scheme.granularity, "group_size", -1)
    return {"bits": scheme.grid.bits, "group_size": size, "sym": scheme.symmetric}


def scheme_of(where: str, said: Mapping[str, Any]) -> Scheme:
    """The inverse of `words`.

    Raises:
        ValueError: A word that this reader does not know.
    """
    bits, size, symmetric = (said.get(key) for key in ("bits", "group_size", "sym"))
    if bits not in BITS or isinstance(bits, bool):
        raise ValueError(f"{where}: bits {bits!r}; expected {', '.join(map(str, BITS))}")
    if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
        raise ValueError(f"{where}: group_size {size!r}; expected a positive integer, or -1")
    if not isinstance(symmetric, bool):
        raise ValueError(f"{where}: sym {symmetric!r}; expected true or false")
    return Scheme(IntGrid(bits), PerChannel() if size == -1 else PerGroup(size), symmetric)


def load(path: Path | str) -> Checkpoint:
    """Opens a checkpoint directory; tensors are read, and checked, when they are asked for.

    Where a certificate lies beside the weights, each tensor is held to its digests.

    Raises:
        ValueError: The directory is incomplete or damaged, or holds another format; the message names tensor and file.
    """
    path, file = Path(path), Path(path) / "config.json"
    config = read_json(file)
    said = config.get("quantization_config") or {}
    if said.get("quant_method") != METHOD:
        raise ValueError(f"{path}: quantized by {said.get('quant_method')!r}; this reader serves {METHOD}")
    version = said.get("checkpoint_format", said.get("format", V1))
    if version not in (V1, V2) or said.get("pack_dtype", "int32") != "int32":
        raise ValueError(
            f"{file}: checkpoint_format {version!r}, pack_dtype {said.get('pack_dtype')!r}; this reader "
            f"serves {V1} and {V2} in int32"
        )
    reader = Reader(path)
    modules = packed_modules(reader, PARTS)
    storage = config.get("dtype") or config.get("torch_dtype")
    dtypes = {name: scale_dtype_of(file, said, reader.dtype(f"{name}.scales")) for name in modules}
    convention = convention_of(file, said)
    schemes = {
        name: replace(scheme, scale_dtype=None if dtypes[name] == storage else dtypes[name], convention=convention)
        for name, scheme in module_schemes(file, said, modules).items()
    }

    def read(name: str) -> QuantizedTensor:
        try:
            found = {part: reader.raw(f"{name}.{part}") for part in PARTS}
            tensor = unpack_tensor(name, found, schemes[name], version, getattr(torch, dtypes[name]))
        except ValueError as error:
            raise ValueError(f"{reader.files[f'{name}.qweight']}: {error}") from None
        if tensor.g_idx is not None and said.get("desc_act") is not True:
            raise ValueError(
                f"{file}: {name}.g_idx puts in-features into groups in another order than theirs, but desc_act is "
                f"{json.dumps(said.get('desc_act'))}, where some readers pass over it; set it to true"
            )
        reader.check(certified_parts(name, tensor), name)
        return tensor

    packed = {f"{module}.{part}" for module in modules for part in PARTS}
    plain = [name for name in reader.files if name not in packed]
    recipe = recipe_of({name: (scheme, None) for name, scheme in schemes.items()})
    return Checkpoint(path, config, recipe, Lazy(modules, read), Lazy(plain, reader.plain), reader.files)


def module_schemes(file: Path, said: Mapping[str, Any], modules: list[str]) -> dict[str, Scheme]:
    """The scheme of every packed module: the file's, with what the first entry of `dynamic` that matches changes.

    Raises:
        ValueError: An entry leaves out a module that is packed, or says something that this reader does not know.
    """
    result, dynamic = {}, said.get("dynamic") or {}
    try:
        patterns = {key: re.compile(key.removeprefix("-:").removeprefix("+:")) for key in dynamic}
        dynamic = {key: dict(value) for key, value in dynamic.items()}
    except (re.error, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{file}: dynamic maps regular expressions to settings; this does not ({error})") from None
    for name in modules:
        hit = next((key for key in dynamic if patterns[key].match(name)), None)
        if hit is not None and hit.startswith("-:"):
            raise ValueError(f"{file}: dynamic {hit!r} leaves out {name}, which is packed")
        own = said if hit is None else {**said, **dynamic[hit]}
        result[name] = scheme_of(str(file) if hit is None else f"{file}: dynamic {hit!r}", own)
    return result
