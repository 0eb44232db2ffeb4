"""Which phase fake-quantization is in, as a pure function of the optimizer step: exact under resume by construction."""

from dataclasses import dataclass

from qat.nn.fake_quantize import Phase


@dataclass(frozen=True)
class PhaseSchedule:
    """Full precision before `start`; scales follow the weights until `freeze`; then they are learned, or stay.

    Raises:
        ValueError: A step is negative, or `freeze` comes before `start`.
    """

    start: int = 0
    freeze: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.freeze:
            raise ValueError(f"schedule start={self.start}, freeze={self.freeze}: expected 0 <= start <= freeze")

    def phase(self, step: int, learns_scale: bool) -> Phase:
        """The phase in which optimizer step `step` (from 0) is taken."""
        if step < self.start:
            return Phase.OFF
        if step < self.freeze:
            return Phase.OBSERVE
        return Phase.LEARN if learns_scale else Phase.FROZEN
