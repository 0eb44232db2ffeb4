"""What the model families are composed of. Knows nothing of quantization: linears are handed in.

    T tokens of the batch · H heads · D head_dim · N hidden size · V vocabulary

Activations are `[T, ...]`, all sequences of a batch one after another; `Paging` says which token belongs to which. The
arithmetic follows transformers' modelling code operation by operation, so that fp32 logits agree to rounding.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qat.kernels.kv_store import PagedVectors, kv_store
from qat.kernels.paged_attention import Paging, paged_attention
from qat.kernels.w4a16 import linear_by_tiles

Cache = tuple[PagedVectors, PagedVectors]  # keys and values of one layer


class Linear(nn.Module):
    """A linear with a plain weight in its storage dtype, multiplied in x's dtype, tile by tile where they differ.

    Args:
        weight: `[O, I]`.
        bias: `[O]`, or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., I]` -> `[..., O]` in x's dtype."""
        if x.dtype == self.weight.dtype:
            return F.linear(x, self.weight, self.bias)
        y = linear_by_tiles(x, tuple(self.weight.shape), lambda start, stop: self.weight[start:stop].to(x.dtype))
        return y if self.bias is None else y + self.bias


class Embedding(nn.Module):
    """A plain table of the vocabulary, in its storage dtype.

    Args:
        weight: `[V, N]`.
    """

    def __init__(self, weight: Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, tokens: Tensor, dtype: torch.dtype) -> Tensor:
        """Token ids `[T]` -> `[T, N]` in `dtype`."""
        return F.embedding(tokens, self.weight).to(dtype)


class Concatenated(nn.Module):
    """Linears of one input, side by side: what cannot be fused into one weight.

    Args:
        linears: In the order of their outputs.
    """

    def __init__(self, linears: Sequence[nn.Module]):
        super().__init__()
        self.linears = nn.ModuleList(linears)

    def forward(self, x: Tensor) -> Tensor:
        """x `[..., I]` -> `[..., sum of O]`."""
        return torch.cat([linear(x) for linear in self.linears], -1)


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype for what is computed in fp32 at least: fp64 where activations are."""
    return torch.promote_types(dtype, torch.float32)


class RMSNorm(nn.Module):
    """`weight * x / rms(x)`, in fp32 or wider.

    Args:
        weight: fp32, of the shape of x's last axes; the mean is over the last one.
        eps: Added to the mean square.
    """

    def __init__(self, weight: Tensor, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(weight, requires_grad=False), eps

    def forward(self, x: Tensor) -> Tensor:
        """x -> its dtype and shape."""
        y, weight = x.to(wide(x.dtype)), self.weight.to(wide(x.dtype))
        if weight.dim() == 1:
            return F.rms_norm(y, weight.shape, weight, self.eps).to(x.dtype)
        return (F.rms_norm(y, y.shape[-1:], eps=self.eps) * weight).to(x.dtype)


class Rotation(NamedTuple):
    """Cosine and signed sine of a batch's positions, `[T, 1, D]` each; made once for all layers."""

    cos: Tensor
    sin: Tensor

    def apply(self, x_THD: Tensor) -> Tensor:
        """Rotates each pair (x[i], x[i + D/2]) of every head."""
        swapped = x_THD.roll(x_THD.shape[-1] // 2, -1)
        return x_THD * self.cos + swapped * self.sin


class Rotary(nn.Module):
    """Rotary position embedding of every kind whose frequencies are fixed once the config is known.

    Args:
        config: Its `rope_parameters` decide; transformers' own functions give the frequencies.
        device: Where they are kept.

    Raises:
        ValueError: The kind depends on the length of the text, or rotates a part of the head only.
    """

    STATIC = ("default", "linear", "llama3", "yarn")

    def __init__(self, config: PretrainedConfig, device: torch.device):
        super().__init__()
        parameters: dict[str, Any] = config.rope_parameters
        kind, dim = parameters["rope_type"], config.head_dim
        if kind not in self.STATIC:
            raise ValueError(
                f"config.json: rope_type {kind!r} is not served; the engine serves {', '.join(self.STATIC)}"
            )
        if parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError("config.json: partial_rotary_factor other than 1 is not served")
        if kind == "default":
            steps = torch.arange(0, dim, 2, dtype=torch.int64).float() / dim
            frequencies, self.scaling = 1.0 / parameters["rope_theta"] ** steps, 1.0
        else:
            frequencies, self.scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
        self.frequencies = nn.Buffer(frequencies.to(device), persistent=False)

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """positions `[T]` -> the rotation in `dtype`, computed in fp32 or wider."""
        angles = positions.to(wide(dtype))[:, None, None] * self.frequencies
        cos, sin = (angles.cos() * self.scaling).to(dtype), (angles.sin() * self.scaling).to(dtype)
        return Rotation(torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))


class Attention(nn.Module):
    """Grouped-query attention through the paged cache.

    Args:
        config: Heads and their dimension.
        qkv: Linear onto queries, keys and values together.
        out: Linear of the heads' outputs.
        qk_norm: Norm of each head of queries and keys, `[H + kv_heads, D]`, before the rotation; None: none.
    """

    def __init__(self, config: PretrainedConfig, qkv: nn.Module, out: nn.Module, qk_norm: nn.Module | None = None):
        super().__init__()
        self.heads, self.kv_heads, self.dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.qkv, self.out, self.qk_norm = qkv, out, qk_norm

    def forward(self, x: Tensor, rotation: Rotation, paging: Paging, cache: Cache) -> Tensor:
        """x `[T, N]` -> `[T, N]`; writes the tokens' keys and values first, so that they see themselves."""
        qkv = self.qkv(x).view(len(x), -1, self.dim)
        qk, v = qkv.split((self.heads + self.kv_heads, self.kv_heads), 1)
        if self.qk_norm is not None:
            qk = self.qk_norm(qk)
        q, k = rotation.apply(qk).split((self.heads, self.kv_heads), 1)
        kv_store(k, v, *cache, paging.slots)
        y = paged_attention(q, *cache, paging, self.dim**-0.5)
        return self.out(y.view(len(x), -1))


class MLP(nn.Module):
    """`down(silu(gate(x)) * up(x))`.

    Args:
        gate_up: Linear onto gate and up together.
        down: Linear back.
    """

    def __init__(self, gate_up: nn.Module, down: nn.Module):
        super().__init__()
        self.gate_up, self.down = gate_up, down

    def forward(self, x: Tensor) -> Tensor:
        """x `[T, N]` -> `[T, N]`."""
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)


class Layer(nn.Module):
    """One decoder layer: attention and MLP, each after a norm and added to the stream."""

    def __init__(self, attention_norm: nn.Module, attention: Attention, mlp_norm: nn.Module, mlp: MLP):
        super().__init__()
        self.attention_norm, self.attention, self.mlp_norm, self.mlp = attention_norm, attention, mlp_norm, mlp

    def forward(self, x: Tensor, rotation: Rotation, paging: Paging, cache: Cache) -> Tensor:
        """x `[T, N]` -> `[T, N]`."""
        x = x + self.attention(self.attention_norm(x), rotation, paging, cache)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """A decoder-only language model.

    Args:
        embedding: Token ids `[T]` and a dtype -> `[T, N]` in it.
        rotary: Position embedding.
        layers: From first to last.
        norm: Norm before the head.
        head: Linear onto the vocabulary.
        dtype: Of the activations.
    """

    def __init__(
        self,
        embedding: nn.Module,
        rotary: Rotary,
        layers: Sequence[Layer],
        norm: nn.Module,
        head: nn.Module,
        dtype: torch.dtype,
    ):
        super().__init__()
        self.embedding, self.rotary, self.layers = embedding, rotary, nn.ModuleList(layers)
        self.norm, self.head, self.dtype = norm, head, dtype

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.rotary.frequencies.device

    def forward(self, tokens: Tensor, positions: Tensor, paging: Paging, caches: Sequence[Cache]) -> Tensor:
        """Token ids and positions `[T]` -> hidden states `[T, N]` before the last norm."""
        x = self.embedding(tokens, self.dtype)
        rotation = self.rotary(positions, self.dtype)
        for layer, cache in zip(self.layers, caches, strict=True):
            x = layer(x, rotation, paging, cache)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """Hidden states `[n, N]` -> fp32 logits `[n, V]`."""
        return self.head(self.norm(hidden)).float()
