"""What formats of weights alone share that store scales in fp16 whatever the storage dtype: GPTQ, AWQ, GGUF."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qat.formats.base import check_tensors
from qat.numerics.qtensor import QuantizedTensor
from qat.numerics.recipe import Recipe
from qat.numerics.scheme import Scheme


def check_static_weight(name: str, method: str, weight: Scheme, input: Scheme | None, kind: str) -> None:
    """Raises ValueError, naming the module, for what no format of weights alone carries."""
    if kind == "Embedding":
        raise ValueError(f"{name}: {method} packs linears only; add a later rule that matches it, with weight=null")
    if input is not None:
        raise ValueError(
            f"{name}: {method} carries weights only; its input scheme {input} cannot be exported. Use format=none"
        )
    if weight.dynamic:
        raise ValueError(f"{name}: a dynamic scale is never stored; set dynamic=false on the weight's scheme")


def check_weights(
    method: str,
    model: PreTrainedModel,
    recipe: Recipe,
    tensors: Mapping[str, QuantizedTensor],
    check_scheme: Callable[[str, Scheme, Scheme | None, str], None],
    dtype: torch.dtype,
) -> None:
    """Raises ValueError if such a format cannot say the recipe, or a tensor is not what it says; names the module."""
    check_tensors(model, recipe, tensors, check_scheme, dtype)
    if recipe.kv is not None:
        raise ValueError(f"recipe.kv: {method} has no word for a KV cache's scheme; use format=compressed_tensors")
    for name, tensor in tensors.items():
        if tensor.scale.dtype != dtype:  # the file has one word for all of them
            raise ValueError(f"{name}: scale in {tensor.scale.dtype}, but the storage dtype is {dtype}")


def check_consecutive(method: str, tensors: Mapping[str, QuantizedTensor]) -> None:
    """Raises ValueError, naming the module, if groups are not of consecutive in-features."""
    for name, tensor in tensors.items():
        if tensor.g_idx is not None:
            raise ValueError(
                f"{name}: its in-features are grouped by a g_idx, which {method} cannot carry. Use format=gptq or "
                f"compressed_tensors, or quantize with act_order=group or static"
            )


def in_half(name: str, scale: Tensor) -> Tensor:
    """Scales in fp16, on the CPU: what GPTQ, AWQ and GGUF store. A bf16 scale above 2**-17 loses nothing.

    Raises:
        ValueError: fp16 does not hold one of them.
    """
    half = scale.to(torch.float16)
    if not bool((off := half.to(scale.dtype) != scale).any()):
        return half.cpu().contiguous()
    raise ValueError(
        f"{name}: the scale {float(scale[off][0])!r} in {str(scale.dtype)[6:]} is none that fp16 holds, in which this "
        f"format stores it. Use export.dtype=float16, or format=compressed_tensors"
    )


def from_half(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `in_half`.

    Raises:
        ValueError: A scale is zero or not finite, or `dtype` does not hold it.
    """
    if not scale.is_floating_point() or not bool((torch.isfinite(scale) & (scale != 0)).all()):
        raise ValueError("a scale is zero or not finite")
    found = scale.to(dtype)
    if not torch.equal(found.to(scale.dtype), scale):
        raise ValueError(f"a scale in {scale.dtype} is none that {dtype} holds, in which the file says it was made")
    return found


def meta(dtype: torch.dtype, tensors: Mapping[str, QuantizedTensor]) -> dict[str, str]:
    """What these formats have no word for: the dtype that scales were made in; and that all have signs, if they do."""
    conventions = {tensor.scheme.convention for tensor in tensors.values() if tensor.scheme.symmetric}
    said = {"scale_convention": "signed"} if conventions == {"signed"} else {}
    return {"scale_dtype": str(dtype).removeprefix("torch."), **said}


def convention_of(file: Path, said: Mapping[str, Any]) -> str:
    """The convention of symmetric scales: what `meta.scale_convention` says, else `ct`.

    Raises:
        ValueError: It is none that they can have.
    """
    found = said.get("meta") or {}
    convention = found.get("scale_convention", "ct") if isinstance(found, dict) else "ct"
    if convention not in ("ct", "signed"):
        raise ValueError(f"{file}: scale_convention {convention!r}; expected ct or signed")
    return str(convention)


def scale_dtype_of(file: Path, said: Mapping[str, Any], stored: str) -> str:
    """Name of the dtype that scales stored in fp16 were made in: what `meta.scale_dtype` says, else as they are stored.

    Raises:
        ValueError: It is none that they can have.
    """
    meta = said.get("meta") or {}
    dtype = meta.get("scale_dtype", stored) if isinstance(meta, dict) else meta
    if dtype not in ("float16", "bfloat16", "float32"):
        raise ValueError(f"{file}: scales in {dtype!r}; expected float16, bfloat16 or float32")
    return str(dtype)
