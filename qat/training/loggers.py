"""Where metrics go: a JSONL file always, and W&B beside it."""

import json
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pytorch_lightning.loggers import Logger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only


class JSONLLogger(Logger):
    """One JSON object a line: `{"step": ..., "train/loss": ...}`.

    Args:
        path: The file; lines are appended.
        step: Optimizer step at which this process starts. Lines from later steps, which a killed process left behind,
            are dropped, since they will be written again.
    """

    def __init__(self, path: Path, step: int = 0):
        super().__init__()
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            path.write_text("".join(line for line in lines if _kept(line, step)), encoding="utf-8")

    @property
    def name(self) -> str:
        """Lightning's name for it."""
        return "jsonl"

    @property
    def version(self) -> str:
        """Lightning asks; a run has one file."""
        return "0"

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run directory holds the config."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Appends one line."""
        row = {"step": step, **{k: float(v) for k, v in metrics.items() if k != "epoch"}}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def wandb_logger(run: Any) -> WandbLogger:
    """Lightning's logger around a W&B run that `cli/tracking.py` opened."""
    return WandbLogger(experiment=run)


def _kept(line: str, step: int) -> bool:
    try:
        return json.loads(line)["step"] < step
    except (ValueError, KeyError, TypeError):
        return False  # a kill cut the line
