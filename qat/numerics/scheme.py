"""Scheme: how ONE tensor is quantized. Torch-free."""

from dataclasses import dataclass

from qat.numerics.granularity import Granularity, PerChannel, PerGroup, PerTensor, PerToken
from qat.numerics.grid import IntGrid

SCALE_DTYPES = ("float32", "bfloat16", "float16")
CONVENTIONS = ("ct",)


@dataclass(frozen=True)
class Scheme:
    """A grid, the elements that share a scale, and how the scale follows from their range.

    Attributes:
        grid: The levels.
        granularity: Which elements share a scale.
        symmetric: Zero is code 0 and no zero point is stored; else an integer zero point goes with every scale.
        dynamic: The scale is computed from each tensor as it comes (activations) and never stored.
        scale_dtype: Name of the dtype that the scale is stored in; None means the storage dtype of the export.
        convention: How a symmetric scale follows from absmax; `ct`, as compressed-tensors has it:
            `absmax / ((2**bits - 1) / 2)`.

    Raises:
        ValueError: A combination that means nothing.
    """

    grid: IntGrid
    granularity: Granularity
    symmetric: bool = True
    dynamic: bool = False
    scale_dtype: str | None = None
    convention: str = "ct"

    def __post_init__(self) -> None:
        if not isinstance(self.grid, IntGrid):
            raise ValueError(f"grid={self.grid!r}: expected an IntGrid")
        if not isinstance(self.granularity, PerTensor | PerChannel | PerGroup | PerToken):
            raise ValueError(f"granularity={self.granularity!r}: expected PerTensor, PerChannel, PerGroup or PerToken")
        if self.grid.bits < 2:
            raise ValueError("bits=1: a two's complement bit has the levels -1 and 0; a scheme needs 2 bits or more")
        if self.scale_dtype is not None and self.scale_dtype not in SCALE_DTYPES:
            raise ValueError(f"scale_dtype={self.scale_dtype!r}: one of {', '.join(SCALE_DTYPES)}, or null")
        if self.convention not in CONVENTIONS:
            raise ValueError(f"convention={self.convention!r}: one of {', '.join(CONVENTIONS)}")
        if isinstance(self.granularity, PerToken) and not self.dynamic:
            raise ValueError("granularity=PerToken needs dynamic=true: tokens are not known before they come")

    def __str__(self) -> str:
        size = f"_g{self.granularity.group_size}" if isinstance(self.granularity, PerGroup) else ""
        name = "" if size else "_" + type(self.granularity).__name__.removeprefix("Per").lower()
        return f"int{self.grid.bits}{size}{name}{'' if self.symmetric else '_asym'}{'_dynamic' if self.dynamic else ''}"
