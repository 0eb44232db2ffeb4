"""The cells of the ablation, as one process makes them: model and tokens are loaded once."""

import gc
import shutil
import time
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from ablation import COMMON, composed
from quality_plan import Cell
from results import Row, locked
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat.cli.devices import by_device
from qat.cli.rundir import RunDir, versions
from qat.cli.workbench import Workbench, device_name, open_workbench
from qat.data.calibration import calibration
from qat.evaluation.divergence import evaluate, mean
from qat.surgery.changes import Changes
from qat.surgery.convert import apply


class Cells:
    """Makes and judges cells, one after another."""

    def __init__(self, given: Namespace):
        self.given = given
        self._opened: Workbench | None = None

    def row(self, cell: Cell) -> tuple[Row, dict[str, Any]]:
        """A row, and what the file says of all rows. `block_...` are of validation, as are perplexity and KL."""
        bench = self._open(cell)
        start = time.monotonic()
        changes: Changes = bench.build("arms", "blockap")(
            bench.judged, bench.recipe, bench.calibration, dtype=bench.dtype
        )
        minutes = (time.monotonic() - start) / 60
        graph = apply(bench.judged, changes.tensors, changes.folded)
        size = bench.config["evaluation"]["batch_size"]
        scores = evaluate(graph, bench.windows, bench.judged, size)
        assert scores.kl is not None
        nll = mean(scores.nll, scores.tokens)
        started, trained_for = cell.recipe.split("-")
        row: Row = {"recipe": cell.recipe, "arm": cell.arm, "seed": cell.seed, "start": started}
        row |= {"trained_for": trained_for, "steps": changes.layers[0]["steps"], "blocks": len(changes.layers)}
        row |= {key: sum(r[key] for r in changes.layers) / len(changes.layers) for key in ("initial", "loss")}
        row |= errors(graph, bench.judged, bench.windows, size)
        row |= {"nll": nll, "ppl": float(torch.tensor(nll, dtype=torch.float64).exp())}
        row |= {"kl": mean(scores.kl, scores.tokens), "minutes": minutes, "commit": self.given.commit}
        meta = {"device": device_name(bench.device), "versions": versions(), "data": bench.tokens.fingerprint}
        shutil.rmtree(bench.run.path)
        del graph, changes
        gc.collect()
        return row, meta | {"settings": " ".join([*COMMON, *self.given.overrides])}

    def _open(self, cell: Cell) -> Workbench:
        config = composed(cell, self.given)
        run = RunDir.open(config)
        if self._opened is None:
            with locked(Path(self.given.work) / "rebuilt.lock"):  # the first of all rebuilds the model
                self._opened = open_workbench(config, run, "validation")
            if self.given.blocks is not None:
                model = self._opened.model
                model.base_model.layers = model.base_model.layers[: self.given.blocks]
        old, calib = self._opened, config["calibration"]
        drawn = calibration(old.tokens, calib["samples"], calib["seq_len"], calib["batch_size"], calib["seed"])
        bench = replace(old, config=by_device(config, old.device.type), run=run, calibration=drawn)
        bench.__dict__["judged"] = old.judged
        return bench


@torch.no_grad()
def errors(graph: PreTrainedModel, full: PreTrainedModel, windows: Tensor, size: int) -> Row:
    """Mean over blocks of the squared error of what they pass on, plain and relative to the token."""
    device, plain, relative = next(full.parameters()).device, [], []
    for batch in windows.split(size):
        found, wanted = (_passed_on(model, batch.to(device)) for model in (graph, full))
        for one, other in zip(found, wanted, strict=True):
            error, power = (one - other).square().mean(-1), other.square().mean(-1)
            plain.append(error.sum())
            relative.append((error / (power + torch.finfo(torch.float32).eps)).sum())
    count = windows.numel() * len(wanted)
    return {"block_mse": float(torch.stack(plain).sum()) / count,
            "block_relative": float(torch.stack(relative).sum()) / count}  # fmt: skip


def _passed_on(model: PreTrainedModel, ids: Tensor) -> list[Tensor]:
    """What each block passes on, fp32."""
    found: list[Tensor] = []

    def keep(block: nn.Module, args: Any, output: Any) -> None:
        found.append((output if isinstance(output, Tensor) else output[0]).float())

    handles = [block.register_forward_hook(keep) for block in model.base_model.layers]
    try:
        model.base_model(input_ids=ids, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found
