"""Adapters as a config says them: a frozen model, and two thin matrices for each linear that train. Torch-free."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LoRA:
    """LoRA-QAT, exact: every quantized linear trains FQ(W + (alpha / rank) B A), W frozen (`nn/lora.py`).

    Attributes:
        rank: r, rows of A and columns of B.
        alpha: The product B A is scaled by alpha / rank (arXiv:2106.09685, section 4.1).
        norms: Whether norms and biases train, too.
        seed: Of A's start.

    Raises:
        ValueError: A value is out of its range.
    """

    rank: int = 16
    alpha: float = 32.0
    norms: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check(self.rank, self.alpha)


@dataclass(frozen=True)
class QLoRA:
    """QLoRA (arXiv:2305.14314): A and B train beside a frozen base of NF4 codes (`nn/qlora.py`), and are merged.

    Attributes:
        rank: r, rows of A and columns of B.
        alpha: The product B A is scaled by alpha / rank.
        dropout: Fraction of the adapter's inputs that is zeroed in training.
        group_size: Elements of the base that share a scale; 64 in the paper.
        norms: Whether norms and biases train, too.
        seed: Of A's start.
        then: The post-training method that quantizes the merged weights under the recipe; None leaves them as they are.

    Raises:
        ValueError: A value is out of its range.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    group_size: int = 64
    norms: bool = False
    seed: int = 0
    then: Callable[..., Any] | None = None

    def __post_init__(self) -> None:
        check(self.rank, self.alpha)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout}: a fraction of at least 0, below 1")
        if self.group_size < 1:
            raise ValueError(f"group_size={self.group_size}: a number of elements, 1 or more")


def check(rank: int, alpha: float) -> None:
    """Raises ValueError if no adapter has such a rank, or none could learn with such an alpha."""
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank={rank}: an adapter has at least 1 row; adapter=none is training without one")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha={alpha}: a finite number above 0; at 0 the adapter would do nothing")
