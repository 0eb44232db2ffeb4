"""Grids: the set of levels that a code can name. Torch-free, so that configs can be checked without it."""

from dataclasses import dataclass


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
