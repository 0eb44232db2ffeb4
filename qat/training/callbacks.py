"""Progress: a bar on a terminal, plain lines elsewhere."""

import sys
import time
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class TrainingProgress(Callback):
    """Shows optimizer steps, loss, tokens per second and validation perplexity.

    Args:
        tokens_per_step: Tokens of one optimizer step.
        every: Steps between two plain lines, or between two losses beside the bar: each waits for the device.
    """

    def __init__(self, tokens_per_step: int, every: int):
        self.tokens_per_step, self.every = tokens_per_step, max(every, 1)
        self._bar: Progress | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Opens the bar, or says where training starts."""
        self._start, self._first = time.monotonic(), trainer.global_step
        if not trainer.is_global_zero:
            return
        if sys.stdout.isatty():
            columns = (TextColumn("qat"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
            self._bar = Progress(*columns, TextColumn("{task.fields[shown]}"))
            self._task = self._bar.add_task("qat", total=trainer.max_steps, completed=self._first, shown="")
            self._bar.start()
        elif self._first:
            print(f"  resumed at step {self._first}", flush=True)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Logs the rate and shows the step, once for each optimizer step."""
        if trainer.fit_loop._should_accumulate():
            return
        step = trainer.global_step
        rate = (step - self._first) * self.tokens_per_step / max(time.monotonic() - self._start, 1e-9)
        pl_module.log("train/tokens_per_second", torch.tensor(rate))  # on the CPU: a number would wait for the device
        if not trainer.is_global_zero:
            return
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
        if step % self.every and step != trainer.max_steps:
            return
        shown = f"loss {float(trainer.callback_metrics['train/loss']):.4f}  {rate:,.0f} tok/s"
        if self._bar is not None:
            self._bar.update(self._task, shown=shown + self._validated(trainer))
        else:
            print(f"  step {step}/{trainer.max_steps}  {shown}", flush=True)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Says what a validation found, at the step that it judged."""
        if self._bar is None and trainer.is_global_zero:
            print(f"  step {trainer.global_step}/{trainer.max_steps}{self._validated(trainer)}", flush=True)

    @staticmethod
    def _validated(trainer: pl.Trainer) -> str:
        ppl = trainer.callback_metrics.get("val/ppl")
        return "" if ppl is None else f"  val ppl {float(ppl):.3f}"

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Closes the bar."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        """Closes the bar, so that the error stands on a line of its own."""
        self.on_train_end(trainer, pl_module)
