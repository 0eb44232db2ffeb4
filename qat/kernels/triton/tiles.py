"""Tiles: how groups of elements that share a scale are cut up for a kernel's programs."""

from typing import NamedTuple

import triton

TILE = 2048  # elements of a program's tile: 16 for each of the threads of its four warps
WARPS = 4
CHUNKS = 32


class Tiles(NamedTuple):
    """One way to cut `[groups, size]` up: a program has a tile of `block_g` groups by `block_e` elements."""

    block_g: int
    block_e: int
    chunks: int  # tiles that a program goes through, one after the other
    parts: int  # programs that share their groups
    programs: int


def tiles(groups: int, size: int, whole: bool) -> Tiles:
    """Tiles of `groups` groups of `size` elements; `whole`: a program sees all of each of its groups, to add them up.

    A width that divides the size is taken where it leaves 64 elements side by side or more, so that no lane idles, and
    no more than CHUNKS tiles after each other, so that sums stay accurate.
    """
    width, divides = triton.next_power_of_2(size), size & -size
    if width != size and divides >= 64 and size // divides <= CHUNKS:
        width = divides
    width = min(width, TILE)
    block_g = min(TILE // width, triton.next_power_of_2(groups))
    steps = -(-size // width)
    chunks, parts = (steps, 1) if whole else (1, steps)
    return Tiles(block_g, width, chunks, parts, -(-groups // block_g) * parts)
