"""The schedule of fake-quantization: pure functions of the optimizer step, so exact under resume by construction."""

from dataclasses import dataclass

from qat.nn.fake_quantize import Phase
from qat.training.winq import WinQ


@dataclass(frozen=True)
class PhaseSchedule:
    """When fake-quantization starts, how fast it comes in, when scales stop following the weights. Steps count from 0.

    Full precision before `start` (delayed start). From then on scales follow the weights before each step, until
    `freeze`; afterwards they are learned, or stay. After a delayed start they follow for one step at least, since the
    weights have moved. With a `ramp`, step t computes with

        W + lambda (Q(W) - W),    lambda = min((t - start) / ramp, 1)

    and with inputs likewise: the warm-up of the Hugging Face report on 1.58-bit fine-tuning, which has
    lambda = min(2 t / T, 1), so `ramp = T / 2`. Gradients are those of this expression. Validation, tests and the
    certificate always see lambda = 1 and quantized weights: what would be served if training ended there. A quantized
    KV cache knows no schedule: keys and values are on their grid from the first step.

    Cost: while lambda < 1, one elementwise operation for each weight and input. Before scales settle, one observation
    of all weights for each step and validation: for 106 M weights, 0.08 s of a CPU core by min-max, and 20 s by the MSE
    search over 80 points.

    Attributes:
        start: The first step that is fake-quantized.
        freeze: The first step whose scales no longer follow the weights.
        ramp: Steps from lambda = 0 to lambda = 1; 0: lambda is 1 from `start` on.
        winq: Periodic re-initialisation of the masters; None: never.

    Raises:
        ValueError: A step is negative, or `freeze` comes before `start`.
    """

    start: int = 0
    freeze: int = 0
    ramp: int = 0
    winq: WinQ | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.freeze:
            raise ValueError(f"schedule start={self.start}, freeze={self.freeze}: expected 0 <= start <= freeze")
        if self.ramp < 0:
            raise ValueError(f"schedule ramp={self.ramp}: expected a number of steps, 0 or more")

    def phase(self, step: int, learns_scale: bool) -> Phase:
        """The phase in which optimizer step `step` is taken."""
        if step < self.start:
            return Phase.OFF
        if step < self._settled:
            return Phase.OBSERVE
        return Phase.LEARN if learns_scale else Phase.FROZEN

    def strength(self, step: int) -> float:
        """lambda of optimizer step `step`."""
        if step < self.start:
            return 0.0
        return 1.0 if step >= self.start + self.ramp else (step - self.start) / self.ramp

    def reinitialises(self, done: int, steps: int) -> bool:
        """Whether masters are re-initialised once `done` of `steps` steps are taken.

        Not while scales follow the weights, with which they would shrink; not after the last step, for nothing.
        """
        return self.winq is not None and done % self.winq.every == 0 and self._settled <= done < steps and done > 0

    def check(self, steps: int) -> None:
        """Raises ValueError if something would never come to pass in `steps` steps."""
        if self.start + self.ramp >= steps:
            raise ValueError(
                f"schedule start={self.start}, ramp={self.ramp}: weights would never be on their grid in training of "
                f"{steps} steps; start + ramp must be below"
            )
        if self.winq is not None and not any(self.reinitialises(done, steps) for done in range(steps)):
            raise ValueError(
                f"schedule winq.every={self.winq.every}: no such step comes after scales are settled (step "
                f"{self._settled}) and before the last of {steps}; lower it, or use winq=null"
            )

    @property
    def _settled(self) -> int:
        """The first step whose scales no longer follow the weights."""
        return max(self.freeze, self.start + 1 if self.start else 0)
