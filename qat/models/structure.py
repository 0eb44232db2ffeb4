"""Structure: what a PTQ method must know of a model family. Data, no forward; names are relative to a decoder block."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Smoothing:
    """Linears whose common input can be scaled down, and what absorbs the inverse.

    Attributes:
        previous: The norm or linear whose output channels are divided by the scales.
        linears: The linears whose in-features are multiplied by them.
        inspect: The module whose output error judges a candidate.
        repeats: `previous` is a value projection whose heads are shared by several query heads (GQA): the scales must
            agree over each group of query heads that reads one of its heads.
    """

    previous: str
    linears: tuple[str, ...]
    inspect: str
    repeats: bool = False


@dataclass(frozen=True)
class Structure:
    """A family of decoder-only models.

    Attributes:
        blocks: Path of the list of decoder blocks.
        stages: Linears of a block in the order in which data flows; those of one stage share their input.
        smoothings: Where scales can be folded, in the order in which AWQ searches them.
        norm: Path of the norm behind the last block.
        offset: What norms add to their weight before they multiply by it: 1 in Gemma.
    """

    blocks: str
    stages: tuple[tuple[str, ...], ...]
    smoothings: tuple[Smoothing, ...]
    norm: str
    offset: float = 0.0
