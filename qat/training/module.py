"""QATModule: one prepared student, and the full-precision teacher that it is held to."""

from dataclasses import asdict
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor
from torchmetrics import SumMetric
from transformers import PreTrainedModel

from qat.nn.fake_quantize import FakeQuantize, Phase
from qat.nn.lora import checksum, frozen
from qat.surgery.prepare import observe, set_phase, set_strength
from qat.training.chunked import chunked_loss
from qat.training.finite import Doubt, first_broken, first_not_finite
from qat.training.graphed import GraphedLoss
from qat.training.losses import Loss
from qat.training.optim import Optim
from qat.training.phases import PhaseSchedule
from qat.training.split import SplitModel
from qat.training.winq import reinitialise

NLL = Loss(kl=0.0, ce=1.0)  # of validation


class QATModule(pl.LightningModule):
    """Trains a prepared causal language model. Checkpoints hold the student, never the teacher.

    Args:
        student: A model after `surgery.prepare`.
        teacher: The full-precision model; None if the loss does not distil.
        loss: What to minimise.
        schedule: Fake-quantization by optimizer step.
        optim: Optimizer and learning rates.
        steps: Optimizer steps in all.
        compiled: Whether the decoders' blocks run through `torch.compile`.
        graphed: Whether steps are replayed as a CUDA graph (`graphed.py`), where the device has such: those in which
            nothing is observed and fake-quantization is all the way on, or off.

    Raises:
        ValueError: The loss distils and there is no teacher, the teacher has another vocabulary, one of the models
            cannot be split into decoder and head (`training.split`), or the schedule does not fit into the steps.
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
        graphed: bool = True,
    ):
        super().__init__()
        if loss.distils and teacher is None:
            parts = ", ".join(f"loss.{name}" for name in loss.weights if name != "ce")
            raise ValueError(f"{parts}: distilling needs the full-precision teacher; pass it, or use loss=ce")
        schedule.check(steps)
        self.student = student
        # No submodules: no checkpoint, no optimizer and no DDP sees the teacher, or the student twice.
        self.split = SplitModel(student, compiled)
        self._teacher = SplitModel(teacher, compiled) if loss.distils and teacher is not None else None
        if self._teacher is not None:
            _check_vocabulary(self.split, self._teacher)
        self.loss, self.schedule, self.optim, self.steps = loss, schedule, optim, steps
        # NaN stays NaN. Not a MeanMetric: with this strategy it forgets its weights (torchmetrics 1.9)
        self.val_nll, self.val_tokens = SumMetric(nan_strategy="disable"), SumMetric(nan_strategy="disable")
        self.learns_scale = any(m.estimator.learns_scale for m in student.modules() if isinstance(m, FakeQuantize))
        self._rng: dict[str, Any] | None = None
        self.graphed = graphed
        self._graph: tuple[tuple[Any, ...], GraphedLoss] | None = None  # and what it was captured for
        self._doubts: list[Doubt] = []
        self.replayed = False  # whether the last step was, and agrees with what certify watches
        self.done = 0  # optimizer steps taken; a Trainer that only tests does not know them
        self._observed: int | None = None  # `done` when scales were last taken from the weights

    @property
    def teacher(self) -> PreTrainedModel | None:
        """The frozen full-precision model; None if the loss does not distil."""
        return None if self._teacher is None else self._teacher.model

    def forward_student(self, input_ids: Tensor) -> Tensor:
        """Logits of the student as training computes them, its decoder compiled or not: `[B, T]` -> `[B, T, V]`."""
        return self.split.logits(self.split.hidden(input_ids))

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
        """Takes up the schedule where the Trainer stands, and restores the random state that a checkpoint carried."""
        self.done = self.global_step
        if self._rng is not None:
            torch.set_rng_state(self._rng["cpu"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(self._rng["cuda"], self.device)

    def as_trained(self) -> None:
        """Puts fake-quantization where the schedule has it in the coming optimizer step."""
        phase = self.schedule.phase(self.done, self.learns_scale)
        if phase is Phase.OBSERVE:
            self._observe()
        set_phase(self.student, phase)
        set_strength(self.student, self.schedule.strength(self.done))

    def as_served(self) -> None:
        """Puts fake-quantization where it would be if training ended here: on, and all the way."""
        if self.schedule.phase(self.done, self.learns_scale) in (Phase.OFF, Phase.OBSERVE):
            self._observe()
        set_phase(self.student, Phase.LEARN if self.learns_scale else Phase.FROZEN)
        set_strength(self.student, 1.0)

    def _observe(self) -> None:
        if self._observed != self.done:  # once for each step, however many micro-batches it has
            observe(self.student)
            self._observed = self.done

    def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> None:
        """The schedule follows the optimizer step, not the batch."""
        self.as_trained()
        if self.schedule.ramp:
            self.log("train/strength", torch.tensor(self.schedule.strength(self.done)))

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        """Loss of one micro-batch of token ids `[B, T]`."""
        if self._replays():
            parts = self._replayed(batch)
        else:
            self._graph = None  # of steps that were unlike this one
            parts = self.parts(batch)
        self.settle()  # what came before, while the GPU is busy with this
        self._doubt("loss", parts["loss"].detach(), batch)
        self.log_dict({f"train/{name}": value.detach() for name, value in parts.items()})
        return parts["loss"]

    def _doubt(self, what: str, value: Tensor, batch: Tensor | None = None) -> None:
        """A number that must be finite. Asking waits for the device, so while steps are replayed the next one asks."""
        self._doubts.append(Doubt(what, value, self.global_step, batch))
        if not self._replays():
            self.settle()

    def settle(self) -> None:
        """Raises ValueError if a loss or a gradient is not finite, and says where; it has moved nothing.

        With accumulation, a loss is asked about before the next micro-batch, so `found_inf` need know the last alone.
        """
        doubts, self._doubts = self._doubts, []
        for doubt in doubts:
            if not doubt.finite():
                where = self._first_bad_gradient() if doubt.batch is None else self._first_bad(doubt.batch)
                raise ValueError(
                    f"{doubt.what} is {float(doubt.value)} at step {doubt.step}{where}; the last checkpoint is kept. "
                    f"Lower optim.lr or optim.scale_lr and run again with resume=never"
                )

    def parts(self, batch: Tensor) -> dict[str, Tensor]:
        """The loss of token ids `[B, T]`, which has a gradient, and its parts."""
        taught = None
        if self._teacher is not None:
            with torch.no_grad():
                taught = self._teacher.hidden(batch)
        return chunked_loss(self.loss, self.split, self.split.hidden(batch), self._teacher, taught, batch)

    def _replays(self) -> bool:
        observes = self.schedule.phase(self.done, self.learns_scale) is Phase.OBSERVE  # asks the device for ranges
        ramps = 0 < self.schedule.strength(self.done) < 1  # another number in each step
        return self.graphed and self.device.type == "cuda" and not observes and not ramps

    def _replayed(self, batch: Tensor) -> dict[str, Tensor]:
        schedule = self.schedule  # what it says of a step is part of what was captured
        key = (schedule.phase(self.done, self.learns_scale), schedule.strength(self.done), batch.shape)
        if self._graph is None or self._graph[0] != key:
            self._graph = None  # its memory, before the next one takes as much
            trained = [p for p in self.student.parameters() if p.requires_grad]
            self._graph = key, GraphedLoss(self.parts, trained, batch)
        return self._graph[1](batch)

    def on_train_end(self) -> None:
        """Holds what was replayed to what hooks can see (`certify`), while both have the weights; frees its memory."""
        self.settle()
        if self._graph is not None:
            with self.trainer.precision_plugin.train_step_context():
                self._graph[1].check()
            self._graph, self.replayed = None, True

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clips weights and scales separately: a scale's gradient sums over its group and would drown the weights'."""
        parts: dict[str, list[Tensor]] = {"weights": [], "scales": []}
        for group in optimizer.param_groups:
            parts["scales" if group["name"] == "scales" else "weights"] += group["params"]
        norms = {
            name: torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            for name, parameters in parts.items()
            if parameters
        }
        # AdamW then leaves everything as it is: it comes before anybody has asked.
        numbers = torch.stack([*norms.values(), *(doubt.value for doubt in self._doubts)])
        optimizer.found_inf = numbers.isfinite().all().logical_not().float() if self._replays() else None
        for name, norm in norms.items():
            self._doubt(f"the gradient of the {name}", norm)
            known = torch.where(norm.isfinite(), norm, 0.0)  # clipping by another would spoil all, and hide the first
            torch.nn.utils.clip_grads_with_norm_(parts[name], gradient_clip_val or float("inf"), known)
            self.log(f"train/grad_norm_{name}", norm)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """One optimizer step, with what the schedule does right after it: no checkpoint falls between the two."""
        super().optimizer_step(*args, **kwargs)
        self.done += 1
        if self.schedule.winq is not None and self.schedule.reinitialises(self.done, self.steps):
            self.settle()
            reinitialise(self.student, self.schedule.winq.alpha)

    def on_validation_epoch_start(self) -> None:
        """Validation judges what would be served if training ended here."""
        self.settle()
        self.as_served()
        self.val_nll.reset()
        self.val_tokens.reset()

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        """Adds up the nll of one batch of token ids `[B, T]`, and its tokens."""
        nll = chunked_loss(NLL, self.split, self.split.hidden(batch, eager=True), None, None, batch)["ce"]
        tokens = batch[:, 1:].numel()
        self.val_nll.update(nll * tokens)
        self.val_tokens.update(tokens)

    def on_validation_epoch_end(self) -> None:
        """Logs nll and perplexity."""
        self._log_judged("val")

    def on_test_epoch_start(self) -> None:
        """Tests judge as validation does: `trainer.test(module, dataloaders, ckpt_path=...)`."""
        self.on_validation_epoch_start()

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        """As `validation_step`."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Logs nll and perplexity."""
        self._log_judged("test")

    def _log_judged(self, split: str) -> None:
        nll = self.val_nll.compute() / self.val_tokens.compute()
        self.log_dict({f"{split}/nll": nll, f"{split}/ppl": nll.exp()})

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Adds what Lightning leaves out: the random state and the schedule.

        With adapters it removes what they leave alone: a run makes that anew from the model it began with.

        Raises:
            ValueError: The last step left something that is not finite: the checkpoint before it is kept.
        """
        self.settle()
        if broken := first_broken(self.student):
            raise ValueError(
                f"{broken} is not finite after step {self.done}; the last checkpoint is kept. Lower optim.lr or "
                f"optim.scale_lr and run again with resume=never"
            )
        if left := frozen(self.student):
            for name in left:
                del checkpoint["state_dict"][f"student.{name}"]
            checkpoint["qat_frozen"] = {name: checksum(value) for name, value in left.items()}
        checkpoint["qat_rng"] = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            checkpoint["qat_rng"]["cuda"] = torch.cuda.get_rng_state(self.device)
        checkpoint["qat_phase"] = self.schedule.phase(self.done, self.learns_scale).value
        checkpoint["qat_schedule"] = asdict(self.schedule)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the random state and the frozen tensors; refuses another schedule's checkpoint, or another model's."""
        self._rng, self.done, self._observed = checkpoint["qat_rng"], checkpoint["global_step"], None
        phase = self.schedule.phase(self.done, self.learns_scale).value
        if checkpoint["qat_phase"] != phase:
            raise ValueError(f"the checkpoint is in phase {checkpoint['qat_phase']}, the schedule says {phase}")
        if checkpoint["qat_schedule"] != (ours := asdict(self.schedule)):
            raise ValueError(f"the checkpoint's schedule is {checkpoint['qat_schedule']}, not {ours}; use resume=never")
        left = frozen(self.student)
        for name, value in left.items():
            if checkpoint.get("qat_frozen", {}).get(name) != checksum(value):
                raise ValueError(
                    f"{name}: the checkpoint's adapters were trained beside another tensor; use resume=never"
                )
        checkpoint["state_dict"] |= {f"student.{name}": value.detach() for name, value in left.items()}

    def _first_bad(self, batch: Tensor) -> str:
        """Where numbers went wrong first: a parameter, or else a module of the student, or else one of the teacher."""
        if broken := first_broken(self.student):
            return f" ({broken} is not finite)"
        for whose, model in {"": self.split, "the teacher's ": self._teacher}.items():
            if model is not None and (name := first_not_finite(model, batch)):
                return f" (the output of {whose}{name} is not finite)"
        return ""

    def _first_bad_gradient(self) -> str:
        """The parameter that backward comes to first among those whose gradient is not finite."""
        for name, parameter in reversed(list(self.student.named_parameters())):
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                return f" (first that of {name})"
        return ""


def _check_vocabulary(student: SplitModel, teacher: SplitModel) -> None:
    differences = [
        f"{what} {theirs} (student {ours})"
        for (what, ours), theirs in zip(student.sizes.items(), teacher.sizes.values(), strict=True)
        if theirs != ours
    ]
    if differences:
        raise ValueError(
            f"the teacher {type(teacher.model).__name__} has another vocabulary: {', '.join(differences)}. "
            f"Distilling compares the two logit by logit: take a teacher with the student's tokenizer and padding, or "
            f"use loss=ce"
        )
