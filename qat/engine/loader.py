"""Loader: a checkpoint directory to a model that runs, without Hugging Face's modelling code."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, PretrainedConfig

from qat.engine.config import EngineConfig
from qat.engine.layers import Decoder
from qat.engine.models.llama import llama
from qat.engine.models.qwen3 import qwen3
from qat.engine.weights import Weights
from qat.formats import awq, compressed_tensors, gguf, gptq
from qat.formats.base import Checkpoint, load_plain, read_json
from qat.nn.packed_linear import PackedLinear
from qat.numerics.kv import check_head_dim, kind_of
from qat.numerics.recipe import Recipe

ARCHITECTURES: dict[str, Callable[[PretrainedConfig, Weights], Decoder]] = {
    "LlamaForCausalLM": llama,
    "MistralForCausalLM": llama,
    "Qwen2ForCausalLM": llama,
    "Qwen3ForCausalLM": qwen3,
}
FORMATS = {"compressed_tensors": compressed_tensors, "gptq": gptq, "awq": awq, "gguf": gguf}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "max_position_embeddings")
HEADS = ("num_attention_heads", "num_key_value_heads", "head_dim")
GROWTH = 1.1  # weights in memory over the bytes of the file, at most


@dataclass(frozen=True)
class Loaded:
    """A model ready to run.

    Attributes:
        model: Its layers, on the device.
        config: The configuration, as transformers reads it.
        max_model_len: Tokens of prompt and output together.
        kv: Kind of its cache, one of `numerics.kv.KINDS`; None: vectors as they are.
        weight_bytes: Bytes of all weights in memory.
        file_bytes: Bytes of the checkpoint's safetensors.
    """

    model: Decoder
    config: PretrainedConfig
    max_model_len: int
    kv: str | None
    weight_bytes: int
    file_bytes: int


def load(path: Path | str, config: EngineConfig) -> Loaded:
    """Opens a checkpoint directory, plain or in one of our formats, and builds its model.

    Raises:
        ValueError: The checkpoint is incomplete, damaged or foreign, or asks for something that is not served; the
            message names the tensor and the file, or the key of config.json.
    """
    checkpoint = open_checkpoint(Path(path))
    described = describe(checkpoint)
    max_model_len = check_length(described, config.max_model_len)
    kv = cache_kind(config, checkpoint.recipe, described.head_dim)
    device = torch.device(config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={config.device!r}: this machine has no CUDA device; use cpu")
    reference = config.kernel == "reference"
    weights = Weights(checkpoint, described, device, activation_dtype(config, described, device), reference)
    model = _builder(described, checkpoint.path)(described, weights).eval()
    weights.finish()
    weight_bytes = bytes_of(model)
    packed = len(checkpoint.tensors) > 0
    assert not packed or weight_bytes <= GROWTH * weights.file_bytes, f"{weight_bytes} of {weights.file_bytes} bytes"
    return Loaded(model, described, max_model_len, kv, weight_bytes, weights.file_bytes)


def open_checkpoint(path: Path) -> Checkpoint:
    """Opens a directory by the format that its config.json names."""
    method = (read_json(path / "config.json").get("quantization_config") or {}).get("quant_method")
    if method is None:
        return load_plain(path)
    methods = {module.METHOD: module for module in FORMATS.values()}
    if method not in methods:
        raise ValueError(
            f"{path}: quantized by {method!r}; the engine serves {', '.join(methods)} and plain checkpoints"
        )
    return methods[method].load(path)


def describe(checkpoint: Checkpoint) -> PretrainedConfig:
    """The configuration, if everything that it asks for is served.

    Raises:
        ValueError: It is malformed, or names an architecture, an activation or an attention that is not.
    """
    file = checkpoint.path / "config.json"
    try:
        config = AutoConfig.from_pretrained(checkpoint.path, local_files_only=True)
    except Exception as error:  # a malformed file fails in many ways
        raise ValueError(f"{file}: not a model configuration ({error})") from None
    _builder(config, file)
    for key in (*SIZES, *HEADS):
        value = getattr(config, key, None)
        if (type(value) is not int or value < 1) and not (key == "head_dim" and value is None):
            raise ValueError(f"{file}: {key} must be a positive integer, found {value!r}")
    if config.dtype is not None and not (isinstance(config.dtype, torch.dtype) and config.dtype.is_floating_point):
        raise ValueError(f"{file}: dtype {config.dtype!r} is none that weights can have")
    if config.hidden_act != "silu":
        raise ValueError(f"{file}: hidden_act {config.hidden_act!r} is not served; the engine serves silu")
    if getattr(config, "head_dim", None) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"{file}: {config.num_attention_heads} heads cannot share {config.num_key_value_heads} key-value heads"
        )
    return config


def check_length(config: PretrainedConfig, asked: int | None) -> int:
    """The model length: what was asked for, or what the model was built for.

    Raises:
        ValueError: The model was not built for the length, or slides a window at it.
    """
    built = config.max_position_embeddings
    length = built if asked is None else asked
    if length > built:
        raise ValueError(f"max_model_len={length}: the model was built for {built} tokens (max_position_embeddings)")
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or ["sliding_attention"])
    window = getattr(config, "sliding_window", None) if slides else None
    if window is not None and window < length:
        raise ValueError(
            f"config.json: sliding_window={window} is not served; up to max_model_len={window} tokens it does not act"
        )
    return length


def activation_dtype(config: EngineConfig, described: PretrainedConfig, device: torch.device) -> torch.dtype:
    """The dtype of activations and cache: asked for, or fp32 on a CPU and the storage dtype on a GPU."""
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    if config.kernel == "reference" or device.type == "cpu":
        return torch.float32
    return described.dtype if isinstance(described.dtype, torch.dtype) else torch.bfloat16


def cache_kind(config: EngineConfig, recipe: Recipe, head_dim: int) -> str | None:
    """The kind of the cache: asked for, or what the checkpoint was made for.

    Raises:
        ValueError: Vectors of this length do not fit the kind.
    """
    kind = None if config.kv == "none" else config.kv
    if kind == "auto":
        kind = None if recipe.kv is None else kind_of(recipe.kv)
    if kind is not None:
        check_head_dim(kind, head_dim)
    return kind


def _builder(config: PretrainedConfig, file: Path) -> Callable[[PretrainedConfig, Weights], Decoder]:
    name = (config.architectures or ["none"])[0]
    if name not in ARCHITECTURES:
        raise ValueError(f"{file}: architecture {name!r} is not served; the engine serves {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def bytes_of(model: nn.Module) -> int:
    """Bytes of every weight in memory, shared ones once."""
    plain = {p.data_ptr(): p.nbytes for p in model.parameters()}
    return sum(plain.values()) + sum(m.nbytes for m in model.modules() if isinstance(m, PackedLinear))
