"""Granularities: which elements of a tensor share one scale. Torch-free.

Every granularity is defined by the shape of its scale. A tensor `x` is grouped as `x.reshape(*scale_shape, -1)`: the
last axis then runs over the elements that share a scale, so no other code needs to know which granularity it serves.
"""

from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class PerTensor:
    """One scale: `[O, I] -> scale [1]`."""

    def scale_shape(self, shape: Shape) -> Shape:
        """Shape of the scale of a tensor of `shape`."""
        return (1,)


@dataclass(frozen=True)
class PerChannel:
    """One scale for each output channel: `[O, I] -> scale [O, 1]`."""

    def scale_shape(self, shape: Shape) -> Shape:
        """Shape of the scale of a tensor of `shape`."""
        return (shape[0], 1)


@dataclass(frozen=True)
class PerGroup:
    """One scale for `group_size` consecutive in-features of a row: `[O, I] -> scale [O, I / group_size]`.

    Raises:
        ValueError: `group_size` is not a positive integer.
    """

    group_size: int

    def __post_init__(self) -> None:
        if isinstance(self.group_size, bool) or not isinstance(self.group_size, int) or self.group_size < 1:
            raise ValueError(f"group_size={self.group_size!r}: a group has a positive number of elements")

    def scale_shape(self, shape: Shape) -> Shape:
        """Shape of the scale of a tensor of `shape`; the group must divide the in-features."""
        if shape[-1] % self.group_size:
            fits = [g for g in (16, 32, 64, 128, 256, 512) if shape[-1] % g == 0]
            raise ValueError(
                f"group_size={self.group_size} does not divide {shape[-1]} in-features; sizes that fit: "
                f"{', '.join(map(str, fits)) or 'none of the usual ones'}, or PerChannel"
            )
        return (*shape[:-1], shape[-1] // self.group_size)


@dataclass(frozen=True)
class PerToken:
    """One scale for each token of an activation: `[..., I] -> scale [..., 1]`."""

    def scale_shape(self, shape: Shape) -> Shape:
        """Shape of the scale of a tensor of `shape`."""
        return (*shape[:-1], 1)


Granularity = PerTensor | PerChannel | PerGroup | PerToken
