"""QuantizedInput: what rounds the input of a served linear, as training's graph rounds it. It has no gradient."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qat.kernels.fake_quant import fake_quantize
from qat.nn.dynamic import fake_quantize_dynamic
from qat.nn.interned import intern
from qat.nn.observers.minmax import MinMax
from qat.numerics.scheme import Scheme, input_parts


@dataclass(frozen=True, eq=False)
class QuantizedInput:
    """An input's scheme, and what is stored of it.

    Attributes:
        scheme: How the input is quantized: dynamic, or on one calibrated range.
        scale: `[1]`, in its stored dtype; static schemes only.
        zero_point: int8 `[1]`; static asymmetric schemes only.
        global_scale: fp32 `[1]`; two-level schemes only.

    Raises:
        ValueError: A part is missing, or is none of the scheme's.
    """

    scheme: Scheme
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    global_scale: Tensor | None = None

    def __post_init__(self) -> None:
        parts = {"scale": self.scale, "zero_point": self.zero_point, "global_scale": self.global_scale}
        found = {f"input_{part}" for part, value in parts.items() if value is not None}
        if found != (wanted := set(input_parts(self.scheme))):
            raise ValueError(f"input scheme {self.scheme}: found {sorted(found)}, stored are {sorted(wanted)}")

    def __call__(self, x: Tensor) -> Tensor:
        """x `[..., I]` on its grid, of x's shape and dtype: bit for bit what `FakeQuantize` computes."""
        if self.scheme.dynamic:
            names = intern(self.scheme), intern(MinMax())
            return fake_quantize_dynamic(x, *names, x.dtype, global_scale=self.global_scale)[0]
        assert self.scale is not None, "static, as was checked"
        return fake_quantize(x, self.scale, self.scheme.grid, x.dtype, zero_point=self.zero_point)[0]

    def equals(self, other: "QuantizedInput | None") -> bool:
        """Whether both round every x alike."""
        if other is None or self.scheme != other.scheme:
            return False
        pairs = [(getattr(self, part), getattr(other, part)) for part in ("scale", "zero_point", "global_scale")]
        return all(a is b or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in pairs)

    def to(self, device: torch.device | str) -> "QuantizedInput":
        """The same on another device."""
        parts = (self.scale, self.zero_point, self.global_scale)
        return QuantizedInput(self.scheme, *(None if part is None else part.to(device) for part in parts))

    @property
    def nbytes(self) -> int:
        """Bytes of what is stored."""
        return sum(part.nbytes for part in (self.scale, self.zero_point, self.global_scale) if part is not None)
