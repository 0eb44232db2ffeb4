"""QATModule: one prepared student, and the full-precision teacher that it is held to."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torchmetrics import MeanMetric
from transformers import PreTrainedModel

from qat.nn.fake_quantize import FakeQuantize, Phase
from qat.surgery.prepare import set_phase
from qat.training.losses import Loss, cross_entropy
from qat.training.optim import Optim
from qat.training.phases import PhaseSchedule


class QATModule(pl.LightningModule):
    """Trains a prepared causal language model. Checkpoints hold the student, never the teacher.

    Args:
        student: A model after `surgery.prepare`.
        teacher: The full-precision model; None if the loss does not distil.
        loss: What to minimise.
        schedule: Phases of fake-quantization by optimizer step.
        optim: Optimizer and learning rates.
        steps: Optimizer steps in all.
        compiled: Whether the student runs through `torch.compile`.

    Raises:
        ValueError: The loss distils and there is no teacher, or the teacher has another vocabulary.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel | None,
        loss: Loss,
        schedule: PhaseSchedule,
        optim: Optim,
        steps: int,
        compiled: bool = False,
    ):
        super().__init__()
        if loss.kl and teacher is None:
            raise ValueError("loss.kl is positive, so training needs the full-precision teacher")
        if teacher is not None and teacher.config.vocab_size != student.config.vocab_size:
            raise ValueError(f"teacher vocabulary {teacher.config.vocab_size}, student {student.config.vocab_size}")
        self.student = student
        # In tuples, so no submodules: no checkpoint, no optimizer and no DDP sees the teacher, or the student twice.
        self._teacher = (teacher,)
        self._forward = (torch.compile(student) if compiled else student,)
        self.loss, self.schedule, self.optim, self.steps = loss, schedule, optim, steps
        self.val_nll = MeanMetric(nan_strategy="disable")  # NaN stays NaN
        self.learns_scale = any(m.estimator.learns_scale for m in student.modules() if isinstance(m, FakeQuantize))
        self._rng: dict[str, Any] | None = None

    @property
    def teacher(self) -> PreTrainedModel | None:
        """The frozen full-precision model."""
        return self._teacher[0]

    @property
    def forward_student(self) -> Any:
        """The student as training calls it, compiled or not."""
        return self._forward[0]

    def configure_optimizers(self) -> Any:
        """AdamW and its schedule, stepped by optimizer step."""
        for name, parameter in self.student.named_parameters():
            assert parameter.dtype == torch.float32, f"{name}: masters are fp32, found {parameter.dtype}"
        optimizer, schedule = self.optim.build(self.student, self.steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Brings the teacher to the student's device."""
        if self.teacher is not None:
            self.teacher.to(self.device).eval().requires_grad_(False)

    def on_train_start(self) -> None:
        """Restores the random state that a checkpoint carried."""
        if self._rng is not None:
            torch.set_rng_state(self._rng["cpu"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(self._rng["cuda"], self.device)

    def set_phase(self) -> Phase:
        """Puts fake-quantization into the phase of the coming optimizer step."""
        phase = self.schedule.phase(self.global_step, self.learns_scale)
        set_phase(self.student, phase)
        return phase

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        """Phases follow the optimizer step, not the batch."""
        self.set_phase()

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Loss of one micro-batch of token ids `[B, T]`."""
        teacher = None
        if self.loss.kl and self.teacher is not None:
            with torch.no_grad():
                teacher = self.teacher(input_ids=batch, use_cache=False).logits
        logits = self.forward_student(input_ids=batch, use_cache=False).logits
        parts = self.loss(logits, teacher, batch)
        if not bool(torch.isfinite(parts["loss"].detach())):
            raise ValueError(
                f"loss is {float(parts['loss'].detach())} at step {self.global_step}{self._first_bad()}; the last "
                f"checkpoint is kept. Lower optim.lr or optim.scale_lr and run again with resume=never"
            )
        self.log_dict({f"train/{name}": value.detach() for name, value in parts.items()})
        return parts["loss"]

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips weights and scales separately: a scale's gradient sums over its group and would drown the weights'."""
        parts: dict[str, list[Tensor]] = {"weights": [], "scales": []}
        for group in optimizer.param_groups:
            parts["scales" if group["name"] == "scales" else "weights"] += group["params"]
        for name, parameters in parts.items():
            if not parameters:
                continue
            norm = torch.nn.utils.clip_grad_norm_(parameters, gradient_clip_val or float("inf"))
            if not bool(torch.isfinite(norm)):
                raise ValueError(
                    f"the gradient of the {name} is {float(norm)} at step {self.global_step}; the last checkpoint is "
                    f"kept. Lower optim.lr or optim.scale_lr and run again with resume=never"
                )
            self.log(f"train/grad_norm_{name}", norm)

    def on_validation_epoch_start(self) -> None:
        """Validation sees what the next step would train."""
        self.set_phase()
        self.val_nll.reset()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Accumulates the nll of one batch of token ids `[B, T]`, weighted by tokens."""
        logits = self.student(input_ids=batch, use_cache=False).logits
        nll = cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        self.val_nll.update(nll.mean(), weight=nll.numel())

    def on_validation_epoch_end(self) -> None:
        """Logs nll and perplexity."""
        nll = self.val_nll.compute()
        self.log_dict({"val/nll": nll, "val/ppl": nll.exp()})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what Lightning leaves out: the random state and the phase."""
        checkpoint["qat_rng"] = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            checkpoint["qat_rng"]["cuda"] = torch.cuda.get_rng_state(self.device)
        checkpoint["qat_phase"] = self.schedule.phase(self.global_step, self.learns_scale).value

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the random state, and refuses a checkpoint from another schedule."""
        self._rng = checkpoint["qat_rng"]
        phase = self.schedule.phase(checkpoint["global_step"], self.learns_scale).value
        if checkpoint["qat_phase"] != phase:
            raise ValueError(f"the checkpoint is in phase {checkpoint['qat_phase']}, the schedule says {phase}")

    def _first_bad(self) -> str:
        for name, parameter in self.student.named_parameters():
            if not bool(torch.isfinite(parameter).all()):
                return f" ({name} is not finite)"
        return ""
