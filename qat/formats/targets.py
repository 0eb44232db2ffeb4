"""What readers outside this project make of a checkpoint: the kernel that takes a layer, or why none does. Torch-free.

Facts, each with its source; none was run here. What is not known is called so, and is not refused.

    vllm          read from source, of several releases: `kernels/linear/mixed_precision/{machete,marlin,exllama}.py`,
                  `quantization/utils/{machete,marlin}_utils.py`, `quantization/compressed_tensors/`
    sglang        `srt/layers/quantization/{marlin_utils.py,compressed_tensors/}`, read from source
    transformers  5.23 with compressed-tensors 0.20: tests/formats hold it to what is said here
    llamacpp      reads GGUF alone

    weights alone, packed    group sizes       types                      K (in)    N (out, of what is fused)
    Machete (Hopper)         -1, 64, 128       int4, int8; with zeros     64        128
    Marlin                   -1, 32, 64, 128   int4, int8; uint4 zeros    any       any     vLLM pads tiles with zeros
    Marlin of SGLang         -1, 32, 64, 128   int4, int8; uint4 zeros    128       64      nothing there pads
    Exllama                  any               int4, int8; fp16 only      any       32 / bits

-1 is one scale for each output channel. Scales may be negative, but not where VLLM_MARLIN_INPUT_DTYPE=int8 lets vLLM's
Marlin round inputs: there they are read as unsigned (vLLM issue 48905). Both engines multiply q, k, v as one layer, and
gate and up. Of groups that are not of consecutive in-features (`g_idx`) all say that they take them, on one GPU, and
vLLM's Marlin then pads nothing.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

from qat.numerics.granularity import PerChannel, PerGroup, PerTensor
from qat.numerics.grid import FloatGrid, IntGrid
from qat.numerics.scheme import E4M3, E8M0, Scheme, integers

READS = {  # what is best for the target first
    "vllm": ("compressed_tensors", "gptq", "awq"),  # its GGUF reader is limited, and was not seen to load one of ours
    "sglang": ("compressed_tensors", "gptq", "awq"),  # its documentation; of GGUF as for vLLM
    "transformers": ("compressed_tensors", "gptq", "awq", "gguf"),
    "llamacpp": ("gguf",),
}
ENGINES = ("vllm", "sglang")
FUSED = {  # vLLM's and SGLang's models of the Llama family stack these
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
MARLIN_GROUPS = (-1, 32, 64, 128)  # MARLIN_SUPPORTED_GROUP_SIZES, in both
MACHETE_GROUPS = (-1, 64, 128)  # query_machete_supported_group_sizes, for 16-bit activations
MACHETE_K, MACHETE_N = 64, 128  # MACHETE_PREPACKED_BLOCK_SHAPE
MARLIN_K, MARLIN_N = 128, 64  # GPTQ_MARLIN_MIN_THREAD_K and _N, where nothing is padded
UNKNOWN = "not known"
LOADED = {  # how transformers computes what it reads
    "compressed_tensors": "torch, decompressed",
    "gptq": "GPTQModel",  # it needs the packages gptqmodel and optimum
    "awq": "GPTQModel",
    "gguf": "torch, dequantized",
}
PACKED_LAYOUT = (
    "packs of 3, 5, 6 and 7 bits have two layouts under one name: compressed-tensors 0.17, which vLLM 0.33.0 pins, "
    "leaves bits of each word empty, 0.18 and later do not; no installed version was seen to load them"
)


@dataclass(frozen=True)
class Layer:
    """A linear of a model.

    Attributes:
        name: The module; or the rule that decides for it, where the model's files are not here to name it.
        shape: (out-features, in-features); None if the model's files do not say.
        weight: Scheme of the weight; None leaves it alone.
        input: Scheme of the input.
        g_idx: Whether its groups, where it has any, are not of consecutive in-features.
    """

    name: str
    shape: tuple[int, int] | None
    weight: Scheme | None
    input: Scheme | None = None
    g_idx: bool = False

    @property
    def group_size(self) -> int:
        """In the engines' words: -1 for one scale for each output channel."""
        return (
            self.weight.granularity.group_size if self.weight and isinstance(self.weight.granularity, PerGroup) else -1
        )

    @property
    def reordered(self) -> bool:
        """Whether its groups are not of consecutive in-features."""
        return self.g_idx and self.group_size > 0

    def __str__(self) -> str:
        shape = "" if self.shape is None else f" {list(self.shape)}"
        return f"{self.name}{shape} as {self.weight}{f' with input {self.input}' if self.input else ''}"


@dataclass(frozen=True)
class Verdict:
    """What a target makes of a layer.

    Attributes:
        layer: The layer, as it is stored.
        kernel: Which kernel takes it; `not known`, or empty where the target refuses it.
        part: What the refusal is about, as a key below the rule: `weight.grid`.
        refused: What is wrong, and the fix; empty if nothing is.
    """

    layer: Layer
    kernel: str
    part: str = ""
    refused: str = ""


def whole(target: str, name: str, dtype: str, kv: Scheme | None) -> Iterator[tuple[str, str]]:
    """What a target refuses of a file as a whole: the key, and what is wrong with it and would be right.

    Args:
        target: One of READS.
        name: The format.
        dtype: Storage dtype of the export.
        kv: Scheme of the KV cache.
    """
    if name not in READS[target]:
        yield "format.name", f"export.target={target} does not read format={name}; use format={READS[target][0]}"
    if target not in ENGINES:
        return
    if dtype == "float32":  # get_supported_act_dtypes of compressed-tensors, GPTQ and AWQ: fp16 and bf16
        yield "export.dtype", f"export.target={target} computes quantized layers in 16 bits; use bfloat16 or float16"
    if kv is not None:  # validate_kv_cache_scheme: strategy tensor alone
        text = f"export.target={target} reads a cache's scheme with one static scale for each tensor, not {kv}"
        yield "recipe.kv", f"{text}; use kv=null, and the engine's own option for its cache"


def verdicts(target: str, name: str, layers: list[Layer], dtype: str) -> list[Verdict]:
    """What a target makes of each quantized layer of a file in a format that it reads."""
    layers = [replace(layer, weight=layer.weight and integers(layer.weight)) for layer in layers]
    fused = _fused(layers) if target in ENGINES else {}
    pairs = {(layer.weight, layer.input) for layer in layers if layer.weight is not None}
    left = [layer.name for layer in layers if layer.weight is None and not _is_head(layer)]
    found = []
    for layer in layers:
        if layer.weight is None:
            continue
        if target in ENGINES:
            found.append(_engine(target, name, layer, fused.get(layer.name, [layer]), dtype))
        elif target == "transformers":
            found.append(_transformers(name, layer, len(pairs) > 1, left))
        else:
            found.append(Verdict(layer, "ggml"))
    return found


def _fused(layers: list[Layer]) -> Mapping[str, list[Layer]]:
    """Module name to all that an engine stacks with it, itself included."""
    stacks: dict[tuple[str, str], list[Layer]] = {}
    for layer in layers:
        parent, _, leaf = layer.name.rpartition(".")
        for whole_name, parts in FUSED.items():
            if parent and leaf in parts:
                stacks.setdefault((parent, whole_name), []).append(layer)
    return {layer.name: stack for stack in stacks.values() for layer in stack}


def _is_head(layer: Layer) -> bool:
    return layer.name.rpartition(".")[2] == "lm_head"


def _engine(target: str, name: str, layer: Layer, stack: list[Layer], dtype: str) -> Verdict:
    """vLLM or SGLang."""
    weight, k, n = layer.weight, None, None
    assert weight is not None
    if _is_head(layer):  # llm-compressor#1820, auto-round#1650: vLLM fails on it
        text = f"export.target={target} does not load a quantized head"
        return _refused(layer, "match", f"{text}; add a later rule for it with weight=null")
    other = next((one for one in stack if (one.weight, one.input) != (weight, layer.input)), None)
    if other is not None:
        text = (
            f"export.target={target} multiplies it and {other.name}, which is {other.weight or 'not quantized'}, as one"
        )
        return _refused(layer, "weight", f"{text}; give both one scheme")
    if layer.shape is not None:
        k, n = layer.shape[1], sum(one.shape[0] for one in stack if one.shape is not None)
    if isinstance(weight.grid, IntGrid) and weight.grid.bits in (3, 5, 6, 7):  # packed with a quantized input, too
        return _odd(target, name, layer, weight.grid.bits, not weight.symmetric)
    if isinstance(weight.grid, IntGrid) and layer.input is None:
        return _packed(target, name, layer, k, n, dtype)
    return Verdict(layer, _computed(layer))


def _packed(target: str, name: str, layer: Layer, k: int | None, n: int | None, dtype: str) -> Verdict:
    """Weights alone, packed in words."""
    weight = layer.weight
    assert weight is not None
    bits, size, zeros = weight.grid.bits, layer.group_size, not weight.symmetric and name != "awq"
    if not isinstance(weight.granularity, PerGroup | PerChannel):
        text = f"export.target={target} has packed weights by group or channel"
        return _refused(layer, "weight.granularity", f"{text}; use PerGroup or PerChannel")
    if bits not in (4, 8):
        return _odd(target, name, layer, bits, zeros)
    if zeros and name == "gptq":  # AutoGPTQConfig: uint4b8 and uint8b128, which have none
        text = f"export.target={target} reads GPTQ's layout without zero points"
        return _refused(layer, "weight.symmetric", f"{text}; use symmetric=true, or format=compressed_tensors")
    word = 32 // bits
    if k is not None and (k % word or (zeros and layer.shape and layer.shape[0] % word)):  # WNA16: size // pack_factor
        text = (
            f"export.target={target} reads whole words of {word} in-features, and of {word} out-features' zero points"
        )
        return _refused(layer, "match", f"{text}; add a later rule for it with weight=null")
    kernels = []
    fits_machete = k is None or n is None or (k % MACHETE_K == 0 and n % MACHETE_N == 0)
    if target == "vllm" and name == "compressed_tensors" and size in MACHETE_GROUPS and fits_machete:
        kernels.append("Machete (Hopper)")
    if size in MARLIN_GROUPS and not (zeros and bits == 8):
        kernels.append("Marlin")
    exllama = target == "vllm" and name == "compressed_tensors" and dtype == "float16" and not zeros and size > 0
    if exllama and (n is None or n % word == 0):
        kernels.append("Exllama")
    if not kernels and zeros and bits == 8:
        text = f"export.target={target} has no kernel for 8 bits with zero points" + _sizes(k, n)
        return _refused(layer, "weight.symmetric", f"{text}; use symmetric=true")
    if not kernels:
        more = " or export.dtype=float16" if target == "vllm" and name == "compressed_tensors" and not zeros else ""
        text = f"export.target={target} has no kernel for groups of {size}"
        return _refused(layer, "weight.granularity", f"{text}; use group_size=32, 64 or 128, PerChannel{more}")
    unpadded = target == "sglang" or layer.reordered
    if unpadded and k is not None and n is not None and (k % MARLIN_K or n % MARLIN_N):
        kernels = [kernel for kernel in kernels if kernel != "Marlin"]
    if not kernels:
        text = f"has Marlin for in-features in multiples of {MARLIN_K} and out-features of {MARLIN_N}{_sizes(k, n)}"
        fix = "add a later rule for it with weight=null" + (", or use act_order=group" if target == "vllm" else "")
        return _refused(layer, "match", f"export.target={target} {text}; {fix}")
    return Verdict(layer, " or ".join(kernels))


def _odd(target: str, name: str, layer: Layer, bits: int, zeros: bool) -> Verdict:
    """Widths other than 4 and 8."""
    if target == "vllm" and name == "compressed_tensors" and bits == 2 and not zeros:
        return Verdict(layer, f"Humming, whether it loads is {UNKNOWN}")  # the scheme's types name it (vLLM PR #34556)
    why = f": {PACKED_LAYOUT}" if target == "vllm" and name == "compressed_tensors" and bits != 2 else ""
    text = f"export.target={target} takes packed weights of 4 and 8 bits, not of {bits}{why}"
    return _refused(layer, "weight.grid", f"{text}; use 4 or 8 bits, or export.target=null")


def _sizes(k: int | None, n: int | None) -> str:
    return "" if k is None else f", not {k} x {n} (with what is fused)"


def _computed(layer: Layer) -> str:
    """Floats, and integers with quantized inputs: the pairs of which `compressed_tensors.py` of both says so."""
    weight, input = layer.weight, layer.input
    assert weight is not None
    by_row = isinstance(weight.granularity, PerChannel | PerTensor) and weight.symmetric
    if weight.scale_dtype in (E4M3, E8M0):
        known = weight.grid == FloatGrid("e2m1") and input in (None, replace(weight, dynamic=True))
        return f"FP4, which kernel is {UNKNOWN}" if known else UNKNOWN
    if weight.grid == FloatGrid("e4m3") and by_row:
        if input is None:
            return "FP8 weights alone, Marlin"
        return (
            "FP8, scaled_mm" if input.grid == weight.grid and not isinstance(input.granularity, PerGroup) else UNKNOWN
        )
    pair = isinstance(weight.grid, IntGrid) and input is not None and isinstance(input.grid, IntGrid)
    if pair and input is not None and by_row and weight.grid.bits == input.grid.bits == 8:
        return "INT8, scaled_mm" if not isinstance(input.granularity, PerGroup) else UNKNOWN
    return UNKNOWN


def _transformers(name: str, layer: Layer, mixed: bool, left: list[str]) -> Verdict:
    weight = layer.weight
    assert weight is not None
    packed = isinstance(weight.grid, IntGrid) and (layer.input is None or weight.grid.bits < 8)
    if name == "compressed_tensors" and layer.reordered:
        text = "export.target=transformers decodes with compressed-tensors, which has no g_idx since 0.19"
        return _refused(layer, "weight.granularity", f"{text}; use act_order=group or static, or format=gptq")
    if name == "compressed_tensors" and packed and not weight.symmetric:
        if mixed:
            text = "export.target=transformers does not load packed zero points beside another scheme"
            return _refused(layer, "weight.symmetric", f"{text}; use symmetric=true, or one scheme for all linears")
        return Verdict(layer, f"{LOADED[name]}, with CompressedTensorsConfig(dequantize=True)")
    if name == "gptq" and (mixed or left):  # it knows no `dynamic`, in which those stand
        text = (
            f"has GPTQ's linears all alike; here {f'{left[0]} is left alone' if left else 'there are several schemes'}"
        )
        return _refused(layer, "weight", f"export.target=transformers {text}; use format=compressed_tensors")
    return Verdict(layer, LOADED[name])


def _refused(layer: Layer, part: str, text: str) -> Verdict:
    return Verdict(layer, "", part, f"{layer}: {text}")
