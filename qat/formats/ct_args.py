"""Schemes in the words of compressed-tensors and back: the sub-format of a module, its config group, a KV cache.

    sub-format             weight                                 input
    pack-quantized         integers of 2 to 8 bits                none; any, where the weight has less than 8 bits
    int-quantized          integers of 8 bits                     any
    float-quantized        e4m3, by channel, tensor or group      any; without one it is called naive-quantized
    nvfp4-pack-quantized   e2m1, groups of 16, scales in e4m3     none, or any
    mxfp4-pack-quantized   e2m1, groups of 32, powers of two      none, or any
    mxfp8-quantized        e4m3, groups of 32, powers of two      none, or any

    input                             strategy       dynamic   stored of it
    one calibrated range              tensor         false     input_scale, and input_zero_point where it has one
    one scale for each token          token          true
    one scale for each group          group          true
    NVFP4: groups under one divisor   tensor_group   local     input_global_scale

No word of the format says how a symmetric integer scale follows from absmax (`Scheme.convention`): the library divides
by 127.5, vLLM by 127, auto-round by 128 with a sign. Where a scheme is not `ct`, a key of our own beside the config
groups says so; the library, transformers and vLLM pass over keys that they do not know. `actorder` `group` says that
modules hold the group of each in-feature, which is then not `i // group_size`: releases before 0.19 read it, and vLLM,
which pins one. Torch-free.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from qat.numerics.granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from qat.numerics.grid import FloatGrid, Grid, IntGrid
from qat.numerics.kv import KINDS, kind_of
from qat.numerics.scheme import E4M3, E8M0, SCALE_DTYPES, Scheme, integers

PACKED, INT, FLOAT, NAIVE = "pack-quantized", "int-quantized", "float-quantized", "naive-quantized"
NVFP4, MXFP4, MXFP8 = "nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized"
SUB_FORMATS = (PACKED, INT, FLOAT, NAIVE, NVFP4, MXFP4, MXFP8)
MIXED = "mixed-precision"
CONVENTIONS = "scale_conventions"  # {group: {"weights" or "input_activations": convention}}, those that are not ct
STRATEGIES = {PerTensor: "tensor", PerChannel: "channel", PerGroup: "group", PerToken: "token"}
REORDERED = "group"  # the `actorder` of modules that hold a g_idx, and its other names
REORDERED_TOO = (True, "dynamic")
BYTES = "torch.uint8"  # how the format calls the dtype of powers of two

Schemes = tuple[Scheme, Scheme | None]  # of a module's weight and of its input


def sub_format(weight: Scheme, input: Scheme | None) -> str:
    """The sub-format of a module whose schemes `refused` has nothing against."""
    if weight.scale_dtype == E4M3:
        return NVFP4
    if weight.scale_dtype == E8M0:
        return MXFP4 if weight.grid.bits == 4 else MXFP8
    if isinstance(weight.grid, FloatGrid):
        return NAIVE if input is None else FLOAT
    return PACKED if input is None or weight.grid.bits < 8 else INT


def refused(weight: Scheme, input: Scheme | None = None) -> Iterator[tuple[str, str]]:
    """What the format cannot carry: the part of a rule, and what is wrong with it and would be right."""
    stored = integers(weight)
    if not _named(stored):
        yield "weight.grid", f"{_GRIDS}, not the weight scheme {weight}; use format=none"
    elif not weight.symmetric and isinstance(weight.granularity, PerTensor) and sub_format(stored, input) == PACKED:
        yield "weight.symmetric", "packs zero points per channel or group, not per tensor; use symmetric=true"
    if input is None:
        return
    if not _named(input):
        yield "input", f"{_GRIDS}, not the input scheme {input}; use format=none or input=null"
    elif input.dynamic and isinstance(input.granularity, PerTensor):
        text = f"carries no input scheme that makes a token depend on those beside it, such as {input}"
        yield "input", f"{text}; use granularity=PerToken or dynamic=false"
    elif not isinstance(input.granularity, PerToken | PerGroup if input.dynamic else PerTensor):
        text = "carries inputs with one calibrated range, or dynamic by the token or group"
        yield "input", f"{text}, not the input scheme {input}; use format=none"


_GRIDS = (
    "carries integers, e4m3, NVFP4 (e2m1, groups of 16, scale_dtype=float8_e4m3fn) and MX (e2m1 or e4m3, groups of 32, "
    "scale_dtype=float8_e8m0fnu)"
)


def _named(scheme: Scheme) -> bool:
    """Whether the format has a name for a grid with such scales."""
    size = scheme.granularity.group_size if isinstance(scheme.granularity, PerGroup) else None
    if scheme.scale_dtype == E8M0:
        return size == 32
    if scheme.scale_dtype == E4M3:
        return scheme.grid == FloatGrid("e2m1") and size == 16
    return isinstance(scheme.grid, IntGrid) or scheme.grid == FloatGrid("e4m3")


def config_groups(by_schemes: Mapping[Schemes, list[str]], reordered: Collection[Schemes] = ()) -> dict[str, Any]:
    """`format`, `config_groups` and our own key, for modules of these schemes; those of `reordered` have a g_idx.

    Modules of one pair of schemes: one group that targets `Linear`. Of several: a group for each, which names them.
    """
    groups, conventions, formats = {}, {}, set()
    for i, ((weight, input), names) in enumerate(by_schemes.items()):
        parts = {"weights": weight} | ({} if input is None else {"input_activations": input})
        words = {part: args(scheme) for part, scheme in parts.items()}
        words["weights"]["actorder"] = REORDERED if (weight, input) in reordered else None
        groups[f"group_{i}"] = {
            "targets": ["Linear"] if len(by_schemes) == 1 else names,
            "format": sub_format(weight, input),
            "input_activations": None,
            "output_activations": None,
            **words,
        }
        formats.add(sub_format(weight, input))
        if said := {part: scheme.convention for part, scheme in parts.items() if scheme.convention != "ct"}:
            conventions[f"group_{i}"] = said
    result = {"format": formats.pop() if len(formats) == 1 else MIXED, "config_groups": groups}
    return result | ({CONVENTIONS: conventions} if conventions else {})


def args(scheme: Scheme) -> dict[str, Any]:
    """A scheme in the format's words."""
    said = {
        "num_bits": scheme.grid.bits,
        "type": "int" if isinstance(scheme.grid, IntGrid) else "float",
        "symmetric": scheme.symmetric,
        "strategy": "tensor_group" if scheme.two_level else STRATEGIES[type(scheme.granularity)],
        "group_size": getattr(scheme.granularity, "group_size", None),
        "dynamic": "local" if scheme.dynamic and scheme.two_level else scheme.dynamic,
        "actorder": None,
        "block_structure": None,
    }
    if scheme.scale_dtype in (E4M3, E8M0) or (scheme.scale_dtype is not None and scheme.dynamic):
        said["scale_dtype"] = BYTES if scheme.scale_dtype == E8M0 else f"torch.{scheme.scale_dtype}"
    return said


def schemes_of(where: str, key: str, quantization: Mapping[str, Any]) -> tuple[str, Scheme, Scheme | None]:
    """The sub-format of a config group, and its schemes; scales whose dtype the file's tensors tell have none here.

    Args:
        where: What messages begin with.
        key: Name of the group.
        quantization: The whole `quantization_config`.

    Raises:
        ValueError: The group says something that this reader does not serve.
    """
    group, conventions = quantization["config_groups"][key], quantization.get(CONVENTIONS) or {}
    conventions = conventions.get(key, {}) if isinstance(conventions, dict) else conventions
    if not isinstance(group, dict) or not isinstance(conventions, dict):
        raise ValueError(f"{where}: expected objects, found {group!r} and {CONVENTIONS} {conventions!r}")
    if group.get("output_activations"):
        raise ValueError(f"{where}: output_activations are set; this reader serves quantized weights and inputs")
    weights = _scheme(f"{where}: weights", group.get("weights") or {}, conventions.get("weights", "ct"))
    said, input = group.get("input_activations"), None
    if said:
        input = _scheme(f"{where}: input_activations", said, conventions.get("input_activations", "ct"))
        if input.convention == "signed":
            raise ValueError(f"{where}: {CONVENTIONS} says signed of input_activations; an input's scale is positive")
    name = group.get("format") or quantization.get("format") or PACKED
    held = {
        PACKED: isinstance(weights.grid, IntGrid),
        INT: isinstance(weights.grid, IntGrid),
        FLOAT: isinstance(weights.grid, FloatGrid) and weights.scale_dtype is None,
        NAIVE: weights.scale_dtype is None,
        NVFP4: weights.scale_dtype == E4M3,
        MXFP4: weights.scale_dtype == E8M0 and weights.grid.bits == 4,
        MXFP8: weights.scale_dtype == E8M0 and weights.grid.bits == 8,
    }
    if not isinstance(name, str) or not held.get(name) or weights.dynamic:
        raise ValueError(
            f"{where}: format {name!r} with weights {weights}; this reader serves {', '.join(SUB_FORMATS)}, each with "
            f"its own kind of static weights"
        )
    for part, text in refused(weights, input):
        raise ValueError(f"{where}: {part}: this reader {text}")
    return name, weights, input


def has_g_idx(where: str, group: Mapping[str, Any], name: str) -> bool:
    """Whether the modules of a config group, of this sub-format, hold the group of each in-feature.

    Raises:
        ValueError: The word is none of the format's, or its sub-format has no such tensor here.
    """
    word = (group.get("weights") or {}).get("actorder")
    if word in (None, False, "weight", "static"):
        return False
    if word not in (REORDERED, *REORDERED_TOO) or name != PACKED:
        raise ValueError(f"{where}: actorder {word!r} in {name!r}; this reader serves {REORDERED!r} in {PACKED!r}")
    return True


def _scheme(where: str, said: Any, convention: str) -> Scheme:
    if not isinstance(said, dict):
        raise ValueError(f"{where}: expected an object, found {said!r}")
    bits, strategy, size, symmetric = (said.get(k) for k in ("num_bits", "strategy", "group_size", "symmetric"))
    if not isinstance(bits, int):
        raise ValueError(f"{where}: num_bits {bits!r}; expected an integer")
    if symmetric is None:
        symmetric = True
    if not isinstance(symmetric, bool):
        raise ValueError(f"{where}: symmetric {symmetric!r}; expected true or false")
    if (said.get("type"), bits) not in (*(("int", b) for b in range(2, 9)), ("float", 4), ("float", 8)):
        raise ValueError(
            f"{where}: type {said.get('type')!r} of bits={bits}; expected int of 2 to 8, or float of 4 or 8"
        )
    grid: Grid = IntGrid(bits) if said["type"] == "int" else FloatGrid("e2m1" if bits == 4 else "e4m3")
    dynamic = said.get("dynamic", False)
    if dynamic not in (True, False) and (dynamic, strategy) != ("local", "tensor_group"):
        raise ValueError(f"{where}: dynamic {dynamic!r} with strategy {strategy!r}; expected true or false")
    scale = _scale_dtype(where, grid, strategy, said.get("scale_dtype"), bool(dynamic))
    granularity = _granularity(where, strategy, size)
    try:
        return Scheme(grid, granularity, symmetric, bool(dynamic), scale, convention)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None


def _granularity(where: str, strategy: Any, size: Any) -> Granularity:
    if strategy in ("group", "tensor_group"):
        if not isinstance(size, int):
            raise ValueError(f"{where}: group_size {size!r}; expected an integer")
        return PerGroup(size)
    whole: dict[Any, Granularity] = {"tensor": PerTensor(), "channel": PerChannel(), "token": PerToken()}
    if strategy not in whole:
        raise ValueError(f"{where}: strategy {strategy!r}; expected group, tensor_group, channel, token or tensor")
    return whole[strategy]


def _scale_dtype(where: str, grid: Grid, strategy: Any, said: Any, dynamic: bool) -> str | None:
    """Static scales of the usual dtypes tell it themselves; FP4 in plain groups has powers of two, said or not."""
    if strategy == "tensor_group":
        return E4M3
    if said == BYTES or (said is None and strategy == "group" and grid == FloatGrid("e2m1")):
        return E8M0
    name = None if said is None else str(said).removeprefix("torch.")
    if name is not None and name not in SCALE_DTYPES:
        raise ValueError(f"{where}: scale_dtype {said!r}; expected one of {', '.join(SCALE_DTYPES)}, {BYTES} or null")
    return name if dynamic else None


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
