"""Grids: the set of levels that a code can name. Torch-free, so that configs can be checked without it.

A grid's levels are in units of the scale. Every grid says `bits` (of a code), `low` and `high` (its outermost levels),
`reach` (the level that the largest magnitude of a symmetric group is mapped to) and `outer` (half the distance between
the outermost level and its neighbour: what lies further out cannot have been rounded there, only clamped).
"""

from dataclasses import dataclass

Levels = tuple[float, ...]


@dataclass(frozen=True)
class IntGrid:
    """The integers of `bits` bits in two's complement: `[-2**(bits-1), 2**(bits-1) - 1]`.

    Codes are signed everywhere in this project, also on asymmetric schemes; a format that stores them unsigned adds
    `2**(bits-1)` when it packs.

    Raises:
        ValueError: `bits` is not an integer in 1..8.
    """

    bits: int

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 1 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits!r}: an integer grid has 1 to 8 bits")

    @property
    def qmin(self) -> int:
        """The smallest code."""
        return -(2 ** (self.bits - 1))

    @property
    def qmax(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1

    @property
    def steps(self) -> int:
        """Distance between the outermost codes, `2**bits - 1`."""
        return 2**self.bits - 1

    low, high = qmin, qmax

    @property
    def reach(self) -> float:
        """Half the distance between the outermost codes, as compressed-tensors has it."""
        return self.steps / 2

    @property
    def outer(self) -> float:
        """Half a step."""
        return 0.5

    def __str__(self) -> str:
        return f"int{self.bits}"


@dataclass(frozen=True)
class FloatGrid:
    """The finite values of a small floating-point format; a code is its bit pattern.

    Attributes:
        name: `e4m3` (OCP FP8, largest 448) or `e2m1` (FP4: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives).

    Raises:
        ValueError: Another name.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in ("e4m3", "e2m1"):
            raise ValueError(f"name={self.name!r}: a float grid is e4m3 or e2m1")

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return 8 if self.name == "e4m3" else 4

    @property
    def exponent(self) -> int:
        """Exponent of the largest power of two on the grid: 8 or 2."""
        return 8 if self.name == "e4m3" else 2

    @property
    def high(self) -> float:
        """The largest level."""
        return 448.0 if self.name == "e4m3" else 6.0

    @property
    def low(self) -> float:
        """The smallest level."""
        return -self.high

    reach = high

    @property
    def outer(self) -> float:
        """Half of the largest step."""
        return 16.0 if self.name == "e4m3" else 1.0

    def __str__(self) -> str:
        return self.name


NF4: Levels = (  # arXiv:2305.14314, appendix E: quantiles of the normal distribution, 0 exact, ends at -1 and 1
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)

CODEBOOKS: dict[str, tuple[Levels, float]] = {  # levels, reach
    "binary": ((-1.0, 1.0), 1.0),  # ParetoQ, arXiv:2502.02631, equation 3: s = a
    "ternary": ((-1.0, 0.0, 1.0), 1.5),  # its stretched elastic quantization, {-2/3, 0, 2/3} a: s = 2a/3
    "seq2": ((-3.0, -1.0, 1.0, 3.0), 4.0),  # the same with 2 bits, {-3/4, -1/4, 1/4, 3/4} a: s = a/4
    "nf4": (NF4, 1.0),
}


@dataclass(frozen=True)
class Codebook:
    """A short list of levels; a code is an index into it. A value halfway between two takes the upper one.

    Attributes:
        name: `binary`, `ternary`, `seq2` (the half-integer levels of ParetoQ's 2 bits, doubled) or `nf4`.

    Raises:
        ValueError: Another name.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in CODEBOOKS:
            raise ValueError(f"name={self.name!r}: a codebook is one of {', '.join(CODEBOOKS)}")

    @property
    def levels(self) -> Levels:
        """The levels, ascending."""
        return CODEBOOKS[self.name][0]

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return (len(self.levels) - 1).bit_length()

    @property
    def low(self) -> float:
        """The smallest level."""
        return self.levels[0]

    @property
    def high(self) -> float:
        """The largest level."""
        return self.levels[-1]

    @property
    def reach(self) -> float:
        """What the largest magnitude of a group is mapped to; beyond `high` on the stretched codebooks."""
        return CODEBOOKS[self.name][1]

    @property
    def outer(self) -> float:
        """Half the distance between the largest level and its neighbour."""
        return (self.levels[-1] - self.levels[-2]) / 2

    @property
    def integer_bits(self) -> int | None:
        """Bits of the smallest integer grid that holds every level; None where levels are no integers."""
        if any(level != int(level) for level in self.levels):
            return None
        return int(self.high).bit_length() + 1

    def __str__(self) -> str:
        return self.name


Grid = IntGrid | FloatGrid | Codebook
