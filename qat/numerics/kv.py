"""KV cache schemes: what a recipe's `kv` may be. Torch-free.

Keys and values come one vector at a time, for each token and head: its scale is found when it comes and is kept beside
its codes. So the scheme is symmetric, dynamic and per token, where the features of a token are those of one head.
"""

from collections.abc import Mapping
from typing import Any

from qat.numerics.granularity import PerToken
from qat.numerics.grid import FloatGrid, IntGrid
from qat.numerics.scheme import Scheme

KINDS: dict[str, Scheme] = {
    "int8": Scheme(IntGrid(8), PerToken(), dynamic=True, convention="vllm"),
    "int4": Scheme(IntGrid(4), PerToken(), dynamic=True, convention="vllm"),
    "fp8": Scheme(FloatGrid("e4m3"), PerToken(), dynamic=True),
}
SCALE_BYTES = 4


def kind_of(scheme: Scheme) -> str:
    """The kind of cache that a scheme asks for, one of `KINDS`.

    Raises:
        ValueError: It is none that a cache can have; the message names `recipe.kv`, and what to write instead.
    """
    for kind, known in KINDS.items():
        if scheme == known:
            return kind
    grids = {known.grid: known for known in KINDS.values()}
    wanted = grids.get(scheme.grid)
    if wanted is None:
        raise ValueError(f"recipe.kv: grid={scheme.grid}; a KV cache is one of {', '.join(KINDS)}, so use kv=int8")
    for field in ("granularity", "dynamic", "symmetric", "scale_dtype", "convention"):
        found, value = getattr(scheme, field), getattr(wanted, field)
        if found != value:
            raise ValueError(
                f"recipe.kv: {field}={found}; a KV cache has one fp32 scale for each token and head, found as they "
                f"come, so use {field}={value}"
            )
    raise AssertionError(scheme)


def check_head_dim(kind: str, head_dim: int) -> None:
    """Raises ValueError if a cache of this kind cannot hold vectors of this length."""
    if kind == "int4" and head_dim % 2:
        raise ValueError(
            f"recipe.kv: int4 packs two codes in a byte, but the model's head_dim={head_dim} is odd; use kv=int8 or "
            f"kv=fp8"
        )


def vector_bytes(kind: str, head_dim: int) -> int:
    """Bytes of one vector of `head_dim` elements in a cache of this kind, its scale included."""
    return head_dim * KINDS[kind].grid.bits // 8 + SCALE_BYTES


def head_dim(config: Mapping[str, Any]) -> int:
    """Elements of a key or value of one head, by a model's config.json.

    Raises:
        ValueError: The config does not say.
    """
    try:
        return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        raise ValueError("config.json: neither head_dim nor hidden_size over num_attention_heads is a number") from None
