"""AWQ's GEMM layout (`quant_method: awq`): 4-bit weights with a zero point, as vLLM, SGLang and GPTQModel read them.

For each quantized module, with unsigned codes u and zeros z (8 added to ours):

    qweight  int32  [I, O / 8]   packed along O
    qzeros   int32  [G, O / 8]   packed along O
    scales   fp16   [G, O]

    W[o, i] = scales[i // group_size, o] * (u[i, o] - z[i // group_size, o])

Eight columns share a word, in the order in which a kernel takes them out two by two: nibble i (bits 4i to 4i+3) holds
column 8c + (0, 2, 4, 6, 1, 3, 5, 7)[i].

The layout always has zeros. A symmetric scheme is one whose zeros are all 8, and comes back as asymmetric with zero
points 0: the same integers and scales, so the same weights. One group size serves the whole file. Scales are fp16;
those of another storage dtype are written if fp16 holds each of them, and `meta.scale_dtype` says what they were.
"""

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
)
from qat.formats.weight_only import (
    check_consecutive,
    check_static_weight,
    check_weights,
    from_half,
    in_half,
    scale_dtype_of,
)
from qat.numerics.granularity import PerChannel, PerGroup
from qat.numerics.grid import IntGrid
from qat.numerics.packing import offset, pack, unpack
from qat.numerics.qtensor import QuantizedTensor, as_integers
from qat.numerics.recipe import Recipe
from qat.numerics.scheme import Scheme, integers

METHOD, VERSION, BITS = "awq", "gemm", 4
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # column of each nibble
INVERSE = (0, 4, 1, 5, 2, 6, 3, 7)  # nibble of each column
PARTS = ("qweight", "qzeros", "scales")


def check_scheme(name: str, weight: Scheme, input: Scheme | None = None, kind: str = "Linear") -> None:
    """Raises ValueError, naming the module, if the format cannot carry a scheme, or a module of that class."""
    check_static_weight(name, METHOD, weight, input, kind)
    scheme = integers(weight)
    if not isinstance(scheme.grid, IntGrid) or scheme.grid.bits != BITS:
        raise ValueError(f"{name}: {METHOD} carries integers of {BITS} bits; {weight} cannot be exported")
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

    Arguments and dtype as those of `compressed_tensors.save`. Recipe and tensors are as `expressed` returns them.

    Raises:
        ValueError: The format cannot carry a scheme, a shape or a scale; or a tensor does not fit the storage dtype.
    """
    check_weights(METHOD, model, recipe, tensors, check_scheme, dtype)
    config = quantization_config(tensors, linear_names(model), dtype)
    write_directory(Path(path), model, tokenizer, state(model, recipe, tensors, folded, dtype), config, dtype)


def expressed(recipe: Recipe, tensors: Mapping[str, QuantizedTensor]) -> tuple[Recipe, dict[str, QuantizedTensor]]:
    """Recipe and tensors as the format says them: on integer grids, with zero points, 0 where there were none.

    Raises:
        ValueError: A module's groups are not of consecutive in-features.
    """
    check_consecutive(METHOD, tensors)
    rules = {
        key: replace(rule, weight=None if rule.weight is None else asymmetric(integers(rule.weight)))
        for key, rule in recipe.rules.items()
    }
    return replace(recipe, rules=rules), {name: _with_zeros(as_integers(t)) for name, t in tensors.items()}


def asymmetric(scheme: Scheme) -> Scheme:
    """The scheme with zero points; the convention by which a symmetric scale was found does not outlive it."""
    return replace(scheme, symmetric=False, convention="ct") if isinstance(scheme.grid, IntGrid) else scheme


def _with_zeros(tensor: QuantizedTensor) -> QuantizedTensor:
    if tensor.zero_point is not None:
        return tensor
    zeros = torch.zeros_like(tensor.scale, dtype=torch.int8)
    return replace(tensor, zero_point=zeros, scheme=asymmetric(tensor.scheme))


def state(
    model: PreTrainedModel,
    recipe: Recipe,
    tensors: Mapping[str, QuantizedTensor],
    folded: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The tensors of the file by name: packed weights, and everything else in the storage dtype."""
    result = unquantized_state(model, tensors, folded, dtype)
    for name, tensor in tensors.items():
        result |= {f"{name}.{part}": value for part, value in pack_tensor(name, tensor).items()}
    return result


def pack_tensor(name: str, tensor: QuantizedTensor) -> dict[str, Tensor]:
    """A quantized weight as the format's tensors, on the CPU.

    Raises:
        ValueError: Its rows do not fill words, or fp16 does not hold a scale; names the module.
    """
    assert tensor.zero_point is not None, f"{name}: `expressed` gives every tensor a zero point"
    assert tensor.g_idx is None, f"{name}: `expressed` lets no such tensor through"
    if tensor.shape[0] % len(ORDER):
        raise ValueError(
            f"{name}: {METHOD} packs multiples of {len(ORDER)} out-features; this has {tensor.shape[0]}. Add a later "
            f"rule that matches it, with weight=null"
        )
    return {
        "qweight": _packed(tensor.codes).cpu(),
        "qzeros": _packed(tensor.zero_point).cpu(),
        "scales": in_half(name, tensor.scale).T.contiguous(),
    }


def _packed(codes: Tensor) -> Tensor:
    """Signed codes `[O, C]` to words `[C, O / 8]`."""
    unsigned = (codes.to(torch.int16) + offset(BITS)).T
    return pack(unsigned.reshape(len(unsigned), -1, len(ORDER))[..., ORDER].flatten(1), BITS)


def _unpacked(words: Tensor, rows: int) -> Tensor:
    """The inverse of `_packed`."""
    unsigned = unpack(words, BITS, rows).reshape(len(words), -1, len(ORDER))[..., INVERSE].flatten(1)
    return (unsigned.T.to(torch.int16) - offset(BITS)).to(torch.int8).contiguous()


def unpack_tensor(name: str, parts: Mapping[str, Tensor], scheme: Scheme, dtype: torch.dtype) -> QuantizedTensor:
    """The inverse of `pack_tensor`, with scales in `dtype`.

    Raises:
        ValueError: A part has the wrong shape or dtype, or a scale is zero or not finite.
    """
    qweight, qzeros, scales = (parts[part] for part in PARTS)
    if qweight.dim() != 2 or scales.dim() != 2:
        raise ValueError(f"{name}.qweight: {tuple(qweight.shape)} with scales {tuple(scales.shape)}; expected matrices")
    rows, columns = scales.shape[1], qweight.shape[0]
    try:
        groups = scheme.granularity.scale_shape((rows, columns))[1]
        scale = from_half(scales.T.contiguous(), dtype)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    wanted = {"qweight": (columns, rows // 8), "qzeros": (groups, rows // 8), "scales": (groups, rows)}
    for part, shape in wanted.items():
        if tuple(parts[part].shape) != shape or (part != "scales" and parts[part].dtype != torch.int32):
            found = f"{parts[part].dtype} {tuple(parts[part].shape)}"
            raise ValueError(f"{name}.{part}: {found}; {BITS}-bit [{rows}, {columns}] needs {shape}")
    return QuantizedTensor(_unpacked(qweight, rows), scale, _unpacked(qzeros, rows), scheme, (rows, columns))


def quantization_config(
    tensors: Mapping[str, QuantizedTensor], linears: list[str], dtype: torch.dtype
) -> dict[str, Any]:
    """The `quantization_config` of config.json.

    Raises:
        ValueError: Modules have different group sizes; names one of another size than the first.
    """
    sizes = {name: getattr(tensor.scheme.granularity, "group_size", -1) for name, tensor in tensors.items()}
    first, size = next(iter(sizes.items()))
    if others := [name for name in sizes if sizes[name] != size]:
        raise ValueError(
            f"{others[0]}: {METHOD} has one group size for the whole file, and {first} has {size} (-1: per channel), "
            f"not {sizes[others[0]]}; use format=gptq or format=compressed_tensors"
        )
    return {
        "quant_method": METHOD,
        "bits": BITS,
        "group_size": size,
        "zero_point": True,
        "version": VERSION,
        "modules_to_not_convert": [name for name in linears if name not in tensors],
        "meta": {"quantizer": ["qat"], "scale_dtype": str(dtype).removeprefix("torch.")},
    }


def scheme_of(file: Path, said: Mapping[str, Any]) -> Scheme:
    """The scheme of the whole file.

    Raises:
        ValueError: It says something that this reader does not serve.
    """
    version = str(said.get("version", said.get("format", VERSION))).lower()
    found = {"bits": said.get("bits"), "version": version, "zero_point": said.get("zero_point")}
    expected = {"bits": BITS, "version": VERSION, "zero_point": True}
    for key, value in expected.items():
        if found[key] != value:
            raise ValueError(f"{file}: {key} {found[key]!r}; this reader serves {value!r}")
    size = said.get("group_size")
    if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
        raise ValueError(f"{file}: group_size {size!r}; expected a positive integer, or -1")
    return Scheme(IntGrid(BITS), PerChannel() if size == -1 else PerGroup(size), symmetric=False)


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
    scheme = scheme_of(file, said)
    reader = Reader(path)
    modules = packed_modules(reader, PARTS)
    storage = config.get("dtype") or config.get("torch_dtype")
    dtypes = {name: scale_dtype_of(file, said, reader.dtype(f"{name}.scales")) for name in modules}
    schemes = {n: replace(scheme, scale_dtype=None if dtype == storage else dtype) for n, dtype in dtypes.items()}

    def read(name: str) -> QuantizedTensor:
        try:
            found = {part: reader.raw(f"{name}.{part}") for part in PARTS}
            tensor = unpack_tensor(name, found, schemes[name], getattr(torch, dtypes[name]))
        except ValueError as error:
            raise ValueError(f"{reader.files[f'{name}.qweight']}: {error}") from None
        reader.check(certified_parts(name, tensor), name)
        return tensor

    packed = {f"{module}.{part}" for module in modules for part in PARTS}
    plain = [name for name in reader.files if name not in packed]
    recipe = recipe_of({name: (scheme, None) for name, scheme in schemes.items()})
    return Checkpoint(path, config, recipe, Lazy(modules, read), Lazy(plain, reader.plain), reader.files)
