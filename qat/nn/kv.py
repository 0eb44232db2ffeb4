"""Fake-quantized keys and values: what a quantized KV cache makes of a model, in training and wherever it is judged.

transformers looks an attention function up by the name in the model's config, and the function that makes the masks by
the same name: both are registered here, since under a name without a mask function masks silently vanish. The cache of
transformers holds what it is given; keys (after the rotation) and values are quantized where attention reads them, all
of them, the current token's too. A vector's codes depend on nothing but the vector, so reading it twice is the same.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from qat.kernels.kv_quant import fake_quantize_kv
from qat.numerics.kv import KINDS, check_head_dim, head_dim, kind_of
from qat.numerics.scheme import Scheme

BASE, PREFIX = "sdpa", "qat_kv_"


class _FakeQuantizeKV(torch.autograd.Function):
    """Straight through: dx = G. The scale follows from x, but is a constant to the gradient; no code is clamped."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str) -> Tensor:
        return fake_quantize_kv(x, kind)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def quantize_kv(model: PreTrainedModel, scheme: Scheme | None) -> None:
    """Switches a model's attention, in place, to keys and values on a grid; its weights and copies keep theirs.

    The switch is a name in the model's config: deep copies carry it, a saved config.json does not.

    Args:
        model: A causal language model whose attention is transformers' `sdpa`, its default.
        scheme: What a recipe's `kv` says; None leaves the model as it is.

    Raises:
        ValueError: What `check_kv` says.
    """
    if scheme is None:
        return
    name = PREFIX + check_kv(model, scheme)
    model.set_attn_implementation(name)
    assert model.config._attn_implementation == name, f"{type(model).__name__} keeps its attention"


def check_kv(model: PreTrainedModel, scheme: Scheme) -> str:
    """The kind of KV cache that a scheme asks for, if the model can have it.

    Raises:
        ValueError: The scheme is none that a KV cache can have, or the model's attention is another one or does not go
            through transformers' `AttentionInterface`.
    """
    kind = kind_of(scheme)
    check_head_dim(kind, head_dim(model.config.to_dict()))
    found = model.config._attn_implementation
    if found not in (BASE, PREFIX + kind):
        raise ValueError(
            f"recipe.kv: keys and values are quantized in front of attention {BASE!r}, but the model's is {found!r}; "
            f"load it with attn_implementation={BASE!r}, or use recipe.kv=null"
        )
    if not model._can_set_attn_implementation():
        raise ValueError(
            f"recipe.kv: the attention of {type(model).__name__} does not go through transformers' AttentionInterface; "
            f"use recipe.kv=null"
        )
    return kind


def _attention(kind: str) -> Callable[..., tuple[Tensor, None]]:
    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        key, value = _FakeQuantizeKV.apply(key, kind), _FakeQuantizeKV.apply(value, kind)
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)

    return attend


for _kind in KINDS:
    AttentionInterface.register(PREFIX + _kind, _attention(_kind))
    AttentionMaskInterface.register(PREFIX + _kind, sdpa_mask)
