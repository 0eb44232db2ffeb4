"""The tensors of a module in each sub-format of compressed-tensors, and back. All are row-major, `[O, I]`.

    pack-quantized    weight_packed int32 [O, ceil(I bits / 32)], codes plus 2**(bits-1), a dense bitstream along I;
                      weight_shape int64 [2]; weight_zero_point int32 [ceil(O bits / 32), G], packed along O;
                      where actorder is group, weight_g_idx int32 [I], the group of each in-feature
    int-quantized     weight int8 [O, I]; weight_zero_point int8 of the scale's shape
    float-quantized   weight float8_e4m3fn [O, I]
    nvfp4             weight_packed uint8 [O, I / 2]; weight_scale float8_e4m3fn; weight_global_scale fp32 [1]
    mxfp4             weight_packed uint8 [O, I / 2]; weight_scale uint8, the e of 2**(e - 127)
    mxfp8             weight float8_e4m3fn [O, I]; weight_scale likewise

Each has a weight_scale of the scheme's scale shape, in the storage dtype where none is named. Zero points belong to
asymmetric schemes only, since vLLM refuses symmetric checkpoints that hold one. FP4: sign << 3 | index into 0, 0.5, 1,
1.5, 2, 3, 4, 6; the even column is the low half of the byte. The global scale is a divisor.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from qat.numerics.affine import scale_dtype
from qat.numerics.grid import FloatGrid, IntGrid
from qat.numerics.packing import num_words, offset, pack, unpack
from qat.numerics.qtensor import QuantizedTensor, as_g_idx, consecutive
from qat.numerics.scheme import E4M3, E8M0, Scheme

PARTS = (
    "weight_packed",
    "weight",
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_global_scale",
    "weight_g_idx",
)
NAN = 0x7F  # the bit patterns of e4m3 that are no number, without their sign


def part_names(scheme: Scheme, packed: bool, reordered: bool = False) -> tuple[str, ...]:
    """The tensors of a module.

    Args:
        scheme: Of its weight.
        packed: Whether integers are a bitstream (`pack-quantized`) or bytes.
        reordered: Whether it has a g_idx.
    """
    integers = isinstance(scheme.grid, IntGrid)
    names = ["weight_packed" if scheme.grid == FloatGrid("e2m1") or (integers and packed) else "weight", "weight_scale"]
    if integers and packed:
        names.append("weight_shape")
    if not scheme.symmetric:
        names.append("weight_zero_point")
    if scheme.two_level:
        names.append("weight_global_scale")
    if reordered:
        names.append("weight_g_idx")
    return tuple(names)


def pack_tensor(tensor: QuantizedTensor, packed: bool = True, reordered: bool = False) -> dict[str, Tensor]:
    """A quantized weight as the sub-format's tensors, on the CPU; packed where it lies. Arguments as `part_names`."""
    assert reordered or tensor.g_idx is None, "nothing would say which in-features a group has"
    scheme, codes, zero_point = tensor.scheme, tensor.codes, tensor.zero_point
    parts = {"weight_scale": tensor.scale}
    if scheme.scale_dtype == E8M0:
        parts["weight_scale"] = tensor.scale.view(torch.uint8)
    if tensor.global_scale is not None:
        parts["weight_global_scale"] = tensor.global_scale
    if isinstance(scheme.grid, IntGrid) and packed:
        bits = scheme.grid.bits
        parts["weight_packed"] = pack(codes.to(torch.int16) + offset(bits), bits)
        parts["weight_shape"] = torch.tensor(tensor.shape, dtype=torch.int64)
        if zero_point is not None:
            parts["weight_zero_point"] = pack((zero_point.to(torch.int16) + offset(bits)).T, bits).T
    elif isinstance(scheme.grid, IntGrid):
        parts["weight"] = codes
        if zero_point is not None:
            parts["weight_zero_point"] = zero_point
    elif scheme.grid == FloatGrid("e4m3"):
        parts["weight"] = codes.view(torch.float8_e4m3fn)
    else:
        parts["weight_packed"] = pack(codes, 4).view(torch.uint8)
    if reordered:
        places = consecutive(tensor.shape[1], tensor.scale.shape[-1])
        parts["weight_g_idx"] = places if tensor.g_idx is None else tensor.g_idx
    return {part: parts[part].cpu().contiguous() for part in part_names(scheme, packed, reordered)}


def unpack_tensor(name: str, parts: Mapping[str, Tensor], scheme: Scheme, packed: bool = True) -> QuantizedTensor:
    """The inverse of `pack_tensor`; a g_idx is read where there is one.

    Raises:
        ValueError: A part has the wrong shape or dtype, a code is none of the grid's, or a scale is zero, not
            finite or, unless codes are integers, negative; the message names it.
    """
    if isinstance(scheme.grid, IntGrid) and packed:
        codes = _bitstream(name, parts, scheme.grid.bits)
    elif isinstance(scheme.grid, IntGrid):
        codes = _matrix(name, parts["weight"], torch.int8)
        if codes.numel() and not scheme.grid.qmin <= int(codes.min()) <= int(codes.max()) <= scheme.grid.qmax:
            raise ValueError(f"{name}.weight: codes {int(codes.min())} to {int(codes.max())} do not fit {scheme.grid}")
    elif scheme.grid == FloatGrid("e4m3"):
        codes = _matrix(name, parts["weight"], torch.float8_e4m3fn).view(torch.uint8)
        if bool(((codes & NAN) == NAN).any()):
            raise ValueError(f"{name}.weight: holds NaN")
    else:
        halves = _matrix(name, parts["weight_packed"], torch.uint8)
        codes = torch.stack((halves & 15, halves >> 4), -1).flatten(-2)
    scale = _scale(name, parts["weight_scale"], scheme, tuple(codes.shape))
    zero_point = None if scheme.symmetric else _zero_point(name, parts["weight_zero_point"], scheme, packed, scale)
    g = parts["weight_global_scale"] if scheme.two_level else None
    if g is not None:
        _check(f"{name}.weight_global_scale", g, torch.float32, (1,))
        _positive(f"{name}.weight_global_scale", g)
    g_idx = _g_idx(name, parts, codes.shape[1], scale.shape[-1])
    try:
        return QuantizedTensor(codes, scale, zero_point, scheme, tuple(codes.shape), g, g_idx)
    except ValueError as error:
        raise ValueError(f"{name}.weight_{error}") from None


def check_input(name: str, value: Tensor, scheme: Scheme) -> None:
    """Raises ValueError, naming the tensor, if it is not what an input of this scheme stores under this name."""
    part = name.rpartition(".")[2]
    if part == "input_zero_point":
        _check(name, value, torch.int8, (1,))
    elif part == "input_global_scale":
        _check(name, value, torch.float32, (1,))
        _positive(name, value)
    else:
        assert part == "input_scale", name
        _check(name, value, scale_dtype(scheme, value.dtype), (1,))
        _positive(name, value)


def _bitstream(name: str, parts: Mapping[str, Tensor], bits: int) -> Tensor:
    if (found := parts["weight_shape"]).numel() != 2 or found.dtype != torch.int64:
        raise ValueError(f"{name}.weight_shape: expected two int64, found {found.dtype} {tuple(found.shape)}")
    rows, columns = (int(n) for n in found)
    words, shape = parts["weight_packed"], (rows, num_words(columns, bits))
    if words.dtype != torch.int32 or tuple(words.shape) != shape:
        raise ValueError(
            f"{name}.weight_packed: {words.dtype} {tuple(words.shape)}; {bits}-bit [{rows}, {columns}] needs "
            f"torch.int32 {shape}"
        )
    return _signed(unpack(words, bits, columns), bits)


def _g_idx(name: str, parts: Mapping[str, Tensor], columns: int, groups: int) -> Tensor | None:
    if "weight_g_idx" not in parts or bool((parts["weight_g_idx"] == -1).all()):  # that is how none was ever set
        return None
    _check(f"{name}.weight_g_idx", parts["weight_g_idx"], torch.int32, (columns,))
    return as_g_idx(parts["weight_g_idx"], groups)


def _zero_point(name: str, stored: Tensor, scheme: Scheme, packed: bool, scale: Tensor) -> Tensor:
    where, rows, bits = f"{name}.weight_zero_point", len(scale), scheme.grid.bits
    if not packed:
        _check(where, stored, torch.int8, tuple(scale.shape))
        return stored
    _check(where, stored, torch.int32, (num_words(rows, bits), *scale.shape[1:]))
    return _signed(unpack(stored.T.contiguous(), bits, rows).T, bits)


def _signed(unsigned: Tensor, bits: int) -> Tensor:
    return (unsigned.to(torch.int16) - offset(bits)).to(torch.int8).contiguous()


def _matrix(name: str, value: Tensor, dtype: torch.dtype) -> Tensor:
    if value.dtype != dtype or value.dim() != 2:
        raise ValueError(f"{name}: weights in {value.dtype} {tuple(value.shape)}, expected {dtype} [O, I]")
    return value


def _scale(name: str, scale: Tensor, scheme: Scheme, shape: tuple[int, ...]) -> Tensor:
    where = f"{name}.weight_scale"
    try:
        expected = scheme.granularity.scale_shape(shape)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if scheme.scale_dtype == E8M0:
        _check(where, scale, torch.uint8, expected)
        scale = scale.view(torch.float8_e8m0fnu)
    elif scheme.scale_dtype == E4M3:
        _check(where, scale, torch.float8_e4m3fn, expected)
    elif tuple(scale.shape) != expected or not scale.is_floating_point():
        raise ValueError(f"{where}: {scale.dtype} {tuple(scale.shape)}, expected {expected}")
    _positive(where, scale, isinstance(scheme.grid, IntGrid))
    return scale


def _check(where: str, value: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if value.dtype != dtype or tuple(value.shape) != shape:
        raise ValueError(f"{where}: {value.dtype} {tuple(value.shape)}, expected {dtype} {shape}")


def _positive(where: str, scale: Tensor, signed: bool = False) -> None:
    values = scale.float().abs() if signed else scale.float()
    if not bool((torch.isfinite(values) & (values > 0)).all()):
        raise ValueError(f"{where}: a scale is zero{'' if signed else ', negative'} or not finite")
