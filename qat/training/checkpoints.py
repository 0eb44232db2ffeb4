"""Checkpoints that a kill at any moment cannot damage: written beside, flushed to disk, then renamed."""

import os
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO


class AtomicCheckpointIO(TorchCheckpointIO):
    """Streams a checkpoint to disk; Lightning's own assembles it in memory first, twice."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Writes `path` whole or not at all."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        try:
            with part.open("wb") as file:
                torch.save(checkpoint, file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)


def checkpointing(directory: Path, every: int) -> ModelCheckpoint:
    """A callback that keeps the newest checkpoint, taken every `every` optimizer steps."""
    return ModelCheckpoint(
        dirpath=directory, filename="{step}", every_n_train_steps=every, save_top_k=1, enable_version_counter=False
    )


def newest(directory: Path) -> Path | None:
    """The checkpoint with the most optimizer steps, or None; a kill between save and clean-up leaves two."""
    found = {int(p.stem.removeprefix("step=")): p for p in directory.glob("step=*.ckpt")}
    return found[max(found)] if found else None
