"""GGUF (`model.gguf`): 4- and 8-bit weights in blocks of 32, as llama.cpp and transformers read them.

A block is 32 consecutive in-features of a row; codes c are unsigned in four bits, signed in eight:

    Q4_0   18 bytes   fp16 d          16 bytes: c[j] | c[j + 16] << 4     w = d * (c - 8)
    Q4_1   20 bytes   fp16 d, fp16 m  16 bytes: likewise                  w = d * c + m
    Q8_0   34 bytes   fp16 d          32 signed bytes                     w = d * c

Symmetric 4 bits are Q4_0, asymmetric ones Q4_1 with m = -d * z, symmetric 8 bits Q8_0. Larger groups, channels and
whole tensors repeat their scale, which changes no value. fp16 has to hold every d and m exactly, or the module is
refused: then what any reader decodes is, to the last bit, what was found. The product d * z often needs a bit more than
fp16 has, so few asymmetric checkpoints pass, but those whose scales `nn/observers/short.py` found.

Other tensors are F32 (norms, biases: llama.cpp wants them so) or in the storage dtype; all exact.

The directory holds the Hugging Face config and tokenizer as well; this reader takes the storage dtype from there.
transformers loads `gguf_file="model.gguf"`. The file itself has the tokenizer too, if llama.cpp knows its way to split
text (`models/gguf_tokenizer.py`); without one llama.cpp refuses the file.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qat.formats.base import (
    Certified,
    Checkpoint,
    Lazy,
    certified_parts,
    read_json,
    recipe_of,
    unquantized_state,
    write_directory,
)
from qat.formats.weight_only import (
    check_consecutive,
    check_static_weight,
    check_weights,
    convention_of,
    from_half,
    in_half,
    meta,
    scale_dtype_of,
)
from qat.models.gguf import Reader
from qat.models.gguf_names import ARCHITECTURES, architecture, metadata, our_name, row_order, their_name
from qat.models.gguf_tokenizer import add_tokenizer
from qat.numerics.granularity import PerGroup
from qat.numerics.grid import IntGrid
from qat.numerics.qtensor import QuantizedTensor, as_integers, regrouped
from qat.numerics.recipe import Recipe
from qat.numerics.scheme import Scheme, integers

METHOD, FILE, BLOCK = "gguf", "model.gguf", 32
TYPES = {(4, True): Type.Q4_0, (4, False): Type.Q4_1, (8, True): Type.Q8_0}
HEADS = {Type.Q4_0: 2, Type.Q4_1: 4, Type.Q8_0: 2}  # bytes before the codes of a block
FILE_TYPES = {
    Type.Q4_0: gguf.LlamaFileType.MOSTLY_Q4_0,
    Type.Q4_1: gguf.LlamaFileType.MOSTLY_Q4_1,
    Type.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
}
STORED = {torch.float32: Type.F32, torch.float16: Type.F16, torch.bfloat16: Type.BF16}


def check_scheme(name: str, weight: Scheme, input: Scheme | None = None, kind: str = "Linear") -> None:
    """Raises ValueError, naming the module, if the format cannot carry a scheme, or a module of that class."""
    check_static_weight(name, METHOD, weight, input, kind)
    scheme = integers(weight)
    if not isinstance(scheme.grid, IntGrid) or (scheme.grid.bits, scheme.symmetric) not in TYPES:
        raise ValueError(
            f"{name}: {METHOD} carries integers of 4 bits, and symmetric ones of 8; {weight} cannot be exported"
        )
    if isinstance(scheme.granularity, PerGroup) and scheme.granularity.group_size % BLOCK:
        raise ValueError(f"{name}: {METHOD} has a scale for every {BLOCK} in-features; {weight} has smaller groups")


def check_model(model: PreTrainedModel) -> None:
    """Raises ValueError if the file could not say what the model is; beside `check_scheme`, before anything is done."""
    metadata(_described(model))
    for name in model.state_dict():
        their_name(name)


def save(
    path: Path | str,
    model: PreTrainedModel,
    recipe: Recipe,
    tensors: Mapping[str, QuantizedTensor],
    folded: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase | None,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """Writes `model.gguf` in a directory with Hugging Face's config and tokenizer; replaces `path` whole or not at all.

    Arguments and dtype as those of `compressed_tensors.save`. Recipe and tensors are as `expressed` returns them.

    Raises:
        ValueError: The format cannot carry a scheme, a shape or a scale; or a tensor does not fit the storage dtype.
    """
    check_weights(METHOD, model, recipe, tensors, check_scheme, dtype)
    config = _described(model)
    fields = metadata(config)
    types = {their_name(f"{name}.weight"): type_of(tensor.scheme) for name, tensor in tensors.items()}
    said = {"quant_method": METHOD, "file": FILE, "meta": meta(dtype, tensors)}

    def write(part: Path, found: Mapping[str, Tensor]) -> None:
        writer = gguf.GGUFWriter(part / FILE, ARCHITECTURES[architecture(config)])
        writer.add_file_type(FILE_TYPES[next(iter(types.values()))])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in fields.items():
            writer.add_float32(key, value) if isinstance(value, float) else writer.add_uint32(key, value)
        if tokenizer is not None:
            add_tokenizer(writer, tokenizer, config["vocab_size"])
        for name, tensor in found.items():
            kind = types.get(name) or STORED[tensor.dtype]
            raw = tensor.view(torch.uint8) if kind == Type.BF16 else tensor
            writer.add_tensor(name, raw.numpy(), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    write_directory(Path(path), model, tokenizer, state(model, recipe, tensors, folded, dtype), said, dtype, write)


def expressed(recipe: Recipe, tensors: Mapping[str, QuantizedTensor]) -> tuple[Recipe, dict[str, QuantizedTensor]]:
    """Recipe and tensors as the format says them: on integer grids, in groups of 32 that repeat larger ones' scales.

    Raises:
        ValueError: A module's groups are not of consecutive in-features.
    """
    check_consecutive(METHOD, tensors)
    block = PerGroup(BLOCK)
    rules = {
        key: replace(rule, weight=None if rule.weight is None else replace(integers(rule.weight), granularity=block))
        for key, rule in recipe.rules.items()
    }
    return replace(recipe, rules=rules), {name: regrouped(as_integers(t), block) for name, t in tensors.items()}


def state(
    model: PreTrainedModel,
    recipe: Recipe,
    tensors: Mapping[str, QuantizedTensor],
    folded: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """The tensors of the file by their GGUF names: blocks as bytes `[O, n]`, vectors in fp32, the rest in `dtype`."""
    result, config = {}, _described(model)
    for name, value in unquantized_state(model, tensors, folded, dtype).items():
        order = row_order(name, config)
        stored = value.float() if value.dim() == 1 else value
        result[their_name(name)] = stored if order is None else stored[order].contiguous()
    for name, tensor in tensors.items():
        order = row_order(name, config)
        blocks = pack_tensor(name, tensor)
        result[their_name(f"{name}.weight")] = blocks if order is None else blocks[order].contiguous()
    return result


def type_of(scheme: Scheme) -> Type:
    """The block that holds a scheme's codes."""
    return TYPES[scheme.grid.bits, scheme.symmetric]


def pack_tensor(name: str, tensor: QuantizedTensor) -> Tensor:
    """A quantized weight as blocks: bytes `[O, I / 32 * size of a block]`, rows in Hugging Face's order, on the CPU.

    Raises:
        ValueError: fp16 does not hold a scale, or a zero point times its scale; names the module.
    """
    assert tensor.g_idx is None, f"{name}: `expressed` lets no such tensor through"
    rows, columns = tensor.shape
    kind, codes = type_of(tensor.scheme), tensor.codes.cpu().reshape(rows, columns // BLOCK, BLOCK)
    parts = [in_half(name, tensor.scale)[..., None].view(torch.uint8)]
    if tensor.zero_point is not None:
        parts.append(_minimum(name, tensor)[..., None].view(torch.uint8))
    if kind == Type.Q8_0:
        parts.append(codes.contiguous().view(torch.uint8))
    else:
        unsigned = (codes + 8).view(torch.uint8)
        parts.append(unsigned[..., : BLOCK // 2] | unsigned[..., BLOCK // 2 :] << 4)
    return torch.cat(parts, -1).flatten(1).contiguous()


def _minimum(name: str, tensor: QuantizedTensor) -> Tensor:
    """`m = -d * z` of unsigned zeros z, in fp16."""
    assert tensor.zero_point is not None
    exact = (tensor.zero_point.float() + 8) * -tensor.scale.float()
    half = exact.to(torch.float16)
    if bool((off := half.float() != exact).any()):
        zero, scale = int(tensor.zero_point[off][0]) + 8, float(tensor.scale[off][0])
        raise ValueError(
            f"{name}: the zero {zero} times the scale {scale!r} is none that fp16 holds, in which Q4_1 stores it. Use "
            f"observer=short, a symmetric scheme, or format=compressed_tensors"
        )
    return half.cpu().contiguous()


def unpack_tensor(name: str, blocks: Tensor, kind: Type, dtype: torch.dtype, scheme: Scheme) -> QuantizedTensor:
    """The inverse of `pack_tensor`, with scales in `dtype`.

    Raises:
        ValueError: A scale is zero or not finite, or a minimum is no whole multiple of its scale; names the module.
    """
    head, size = HEADS[kind], gguf.GGML_QUANT_SIZES[kind][1]
    split = blocks.reshape(len(blocks), -1, size)
    half = split[..., :head].contiguous().view(torch.float16)
    rows, columns = len(blocks), split.shape[1] * BLOCK
    try:
        scale = from_half(half[..., 0].contiguous(), dtype)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    payload = split[..., head:].contiguous()
    if kind == Type.Q8_0:
        codes = payload.view(torch.int8)
    else:
        codes = torch.cat((payload & 15, payload >> 4), -1).view(torch.int8) - 8
    zero_point = None
    if kind == Type.Q4_1:
        zero = -half[..., 1].float() / scale.float()  # exact where it is a whole number: all have few bits
        if not bool(((zero == zero.round()) & (zero >= 0) & (zero < 16)).all()):
            raise ValueError(f"{name}: a minimum is not 0 to 15 times its scale, so there is no zero point")
        zero_point = (zero - 8).to(torch.int8)
    return QuantizedTensor(codes.reshape(rows, columns).contiguous(), scale, zero_point, scheme, (rows, columns))


def _described(model: PreTrainedModel) -> dict[str, Any]:
    return model.config.to_dict() | {"architectures": [type(model).__name__]}


def load(path: Path | str) -> Checkpoint:
    """Opens a directory that `save` wrote; tensors are read, and checked, when they are asked for.

    Where a certificate lies beside the weights, each tensor is held to its digests.

    Raises:
        ValueError: The directory is incomplete or damaged, or holds another format; the message names tensor and file.
    """
    path, file = Path(path), Path(path) / "config.json"
    config = read_json(file)
    said = config.get("quantization_config") or {}
    if said.get("quant_method") != METHOD:
        raise ValueError(f"{path}: quantized by {said.get('quant_method')!r}; this reader serves {METHOD}")
    architecture(config)
    weights, certified = path / FILE, Certified(path)
    storage = str(config.get("dtype") or config.get("torch_dtype"))
    dtype = scale_dtype_of(file, said, "float16")
    stored = {our_name(t.name): t for t in tensors_of(weights)}
    kinds = {name.removesuffix(".weight"): t.tensor_type for name, t in stored.items() if t.tensor_type in HEADS}
    if not kinds:
        raise ValueError(f"{weights}: no tensor is {', '.join(kind.name for kind in HEADS)}")
    back = {kind: key for key, kind in TYPES.items()}
    stored_as, convention = None if dtype == storage else dtype, convention_of(file, said)
    schemes = {
        name: Scheme(IntGrid(bits), PerGroup(BLOCK), symmetric, scale_dtype=stored_as, convention=convention)
        for name, kind in kinds.items()
        for bits, symmetric in (back[kind],)
    }

    def rows(name: str) -> Tensor:
        value = torch.from_numpy(np.array(stored[name].data))
        if (order := row_order(name, config)) is None:
            return value
        if len(order) != len(value):
            raise ValueError(f"{weights}: tensor {name} has {len(value)} rows; config.json asks for {len(order)}")
        return value[order.argsort()]

    def read(name: str) -> QuantizedTensor:
        try:
            found = unpack_tensor(name, rows(f"{name}.weight"), kinds[name], getattr(torch, dtype), schemes[name])
        except ValueError as error:
            raise ValueError(f"{weights}: {error}") from None
        certified.check(certified_parts(name, found), weights)
        return found

    def plain(name: str) -> Tensor:
        kind = stored[name].tensor_type
        if kind not in STORED.values():
            raise ValueError(f"{weights}: tensor {name} is {kind.name}, which this reader does not serve")
        value = rows(name)
        value = value.contiguous().view(torch.bfloat16) if kind == Type.BF16 else value
        result = value.to(getattr(torch, storage))
        if not torch.equal(result.to(value.dtype), value):
            raise ValueError(f"{weights}: tensor {name} holds values beyond the {storage} of config.json")
        certified.check({name: result}, weights)
        return result

    others = [name for name in stored if name.removesuffix(".weight") not in kinds]
    files = dict.fromkeys(stored, weights)
    return Checkpoint(
        path,
        config,
        recipe_of({name: (scheme, None) for name, scheme in schemes.items()}),
        Lazy(list(kinds), read),
        Lazy(others, plain),
        files,
    )


def tensors_of(file: Path) -> list[Any]:
    """The tensors of a GGUF file, as its package describes them.

    Raises:
        ValueError: The file is missing, truncated or no GGUF file.
    """
    try:
        return list(Reader(file).tensors)
    except FileNotFoundError:
        raise ValueError(f"{file}: no such file; the checkpoint is incomplete") from None
    except Exception as error:  # a damaged header fails in many ways
        raise ValueError(f"{file}: truncated or not a GGUF file ({error})") from None
