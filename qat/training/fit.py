"""fit: a prepared student is trained to the last step, from wherever a checkpoint left off."""

import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback
from pytorch_lightning.loggers import Logger
from transformers import PreTrainedModel

from qat.data.text import Tokens
from qat.training.callbacks import TrainingProgress
from qat.training.checkpoints import AtomicCheckpointIO, checkpointing, newest
from qat.training.datamodule import TokenData
from qat.training.loggers import JSONLLogger
from qat.training.losses import Loss
from qat.training.module import QATModule
from qat.training.optim import Optim
from qat.training.phases import PhaseSchedule

# Lightning and dynamo about themselves: nothing to act on
THIRD_PARTY = ".*treespec, LeafSpec.*|.*Checkpoint directory .* exists.*|.*a Tensor that is not a leaf Tensor.*"

PRECISIONS = ("auto", "32-true", "bf16-mixed")


@dataclass(frozen=True)
class Training:
    """How long, how much at once, how often.

    Attributes:
        max_steps: Optimizer steps.
        batch_size: Sequences in a micro-batch.
        seq_len: Tokens in a sequence.
        accumulate: Micro-batches for each optimizer step.
        clip: Gradient norm, of weights and of scales separately; None: not clipped.
        precision: Lightning's; `auto` is bf16-mixed where the GPU has bf16, else 32-true.
        checkpoint_every: Optimizer steps between checkpoints.
        val_every: Optimizer steps between validations.
        val_windows: Windows of the validation split.
        compile: Whether the models' blocks run through `torch.compile`.
        cuda_graph: Whether a GPU replays steps as a CUDA graph; a CPU has none.
        log_every: Optimizer steps between two lines of metrics; each waits for the device.
        seed: Order of the batches.
        lightning: More arguments for Lightning's Trainer.
    """

    max_steps: int
    batch_size: int
    seq_len: int
    accumulate: int = 1
    clip: float | None = 1.0
    precision: str = "auto"
    checkpoint_every: int = 100
    val_every: int = 100
    val_windows: int = 4
    compile: bool = False
    cuda_graph: bool = True
    log_every: int = 1
    seed: int = 0
    lightning: dict[str, Any] = field(default_factory=dict)


def precision(wanted: str, device: torch.device) -> str:
    """Lightning's name of the precision to train in: masters are fp32 in each."""
    if wanted not in PRECISIONS:
        raise ValueError(f"trainer.precision={wanted}: one of {', '.join(PRECISIONS)}; masters stay fp32")
    if wanted != "auto":
        return wanted
    return "bf16-mixed" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "32-true"


def fit(
    student: PreTrainedModel,
    teacher: PreTrainedModel | None,
    tokens: Tokens,
    training: Training,
    loss: Loss,
    schedule: PhaseSchedule,
    optim: Optim,
    directory: Path,
    device: torch.device,
    loggers: list[Logger] | None = None,
    callbacks: list[Callback] | None = None,
) -> tuple[QATModule, dict[str, float]]:
    """Trains `student` in place; a checkpoint in `directory` is resumed.

    Args:
        student: A prepared model.
        teacher: The full-precision model; needed where the loss distils.
        tokens: Prepared tokens.
        training: Sizes.
        loss: What to minimise.
        schedule: Phases.
        optim: Optimizer and learning rates.
        directory: The run directory: `checkpoints/` and `metrics.jsonl` are made in it.
        device: Where to train.
        loggers: Loggers beside JSONL.
        callbacks: Callbacks beside ours.

    Returns:
        The module that trained, and `steps` taken in this process, `tokens` seen and `seconds`.

    Raises:
        ValueError: The loss or a gradient is not finite, the checkpoint belongs to another run, or the schedule does
            not fit what trains.
    """
    checkpoint = newest(directory / "checkpoints")
    first = int(checkpoint.stem.removeprefix("step=")) if checkpoint else 0
    data = TokenData(
        tokens, training.seq_len, training.batch_size, training.accumulate, training.val_windows, training.seed
    )
    if optim.train == "scales" and schedule.freeze:
        raise ValueError(
            f"schedule.freeze={schedule.freeze}: until then scales follow the weights, but optim.train=scales has its "
            f"codes settled; use 0"
        )
    optim.select(student)
    steps = training.max_steps
    module = QATModule(student, teacher, loss, schedule, optim, steps, training.compile, training.cuda_graph)
    saver = checkpointing(directory / "checkpoints", training.checkpoint_every)
    per_step = training.batch_size * training.accumulate * training.seq_len
    progress = TrainingProgress(per_step, max(training.max_steps // 16, 1))
    device_index = [device.index or 0] if device.type == "cuda" else 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=THIRD_PARTY)
        trainer = pl.Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=device_index,
            max_steps=training.max_steps,
            max_epochs=-1,
            accumulate_grad_batches=training.accumulate,
            gradient_clip_val=training.clip,
            precision=precision(training.precision, device),  # type: ignore[arg-type]
            val_check_interval=training.val_every * training.accumulate,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=0,
            logger=[JSONLLogger(directory / "metrics.jsonl", first), *(loggers or [])],
            callbacks=[progress, saver, *(callbacks or [])],
            plugins=[AtomicCheckpointIO()],
            log_every_n_steps=training.log_every,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            **training.lightning,
        )
        start = time.monotonic()
        trainer.fit(module.train(), datamodule=data, ckpt_path=checkpoint, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    last = directory / "checkpoints" / f"step={trainer.global_step}.ckpt"
    if not last.exists():
        trainer.save_checkpoint(last)
    student.to(device)
    taken = trainer.global_step - first
    return module, {"steps": taken, "tokens": taken * per_step, "seconds": time.monotonic() - start}
