"""The cells of the quality table, as one process makes them: model and tokens are loaded once."""

import copy
import gc
import shutil
import time
from argparse import Namespace
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from pytorch_lightning import seed_everything
from quality_plan import TRAINED, Cell, composed, digest, written
from results import Row, locked
from torch import Tensor
from transformers import PreTrainedModel

from qat.cli.arms import static_inputs, train
from qat.cli.devices import by_device
from qat.cli.rundir import RunDir, versions
from qat.cli.workbench import Workbench, device_name, open_workbench
from qat.data.calibration import calibration
from qat.data.text import Tokens, load
from qat.evaluation.divergence import Scores, evaluate, mean, standard_error
from qat.surgery.changes import Changes
from qat.surgery.convert import Folded, Tensors, apply, convert
from qat.surgery.match import match
from qat.surgery.prepare import prepare_unquantized
from qat.training.fit import Training, fit

PROSE = ("web", "wives")


@dataclass
class Made:
    """What is judged, its quantized tensors, and what it took to make it, for the row."""

    graph: PreTrainedModel
    tensors: Tensors = field(default_factory=dict)
    cost: Row = field(default_factory=dict)


class Cells:
    """Makes and judges cells, one after another."""

    def __init__(self, arguments: Namespace):
        self.arguments = arguments
        # What several cells need: fine-tuned models, results of Block-AP; of this code alone
        self.kept = Path(arguments.work) / "kept" / str(arguments.commit)
        self._opened: dict[Any, Workbench] = {}

    def row(self, cell: Cell) -> tuple[Row, Row]:
        """A row of the table, and what the file says of all rows."""
        start = time.monotonic()
        bench = self.open(cell)
        made = self._made(cell, bench)
        count = sum(t.codes.numel() for t in made.tensors.values())
        bits = sum(t.bits for t in made.tensors.values()) / count if count else bench.dtype.itemsize * 8.0
        sha, commit = digest(cell, self.arguments), self.arguments.commit
        named = {"recipe": cell.recipe, "arm": cell.arm, "seed": cell.seed, "bits_per_quantized_weight": bits}
        judged = self._judged(made.graph, bench)
        elsewhere = made.cost.pop("elsewhere_minutes", 0.0)
        minutes: Row = {"minutes": (time.monotonic() - start) / 60 + elsewhere}
        minutes |= {"device": device_name(bench.device), "settings": sha, "commit": commit}
        meta = {
            "versions": versions(),
            "data": {name: tokens.fingerprint for name, tokens in self._texts.items()} | self._more,
            "settings": {sha: written(cell, self.arguments)},
        }
        shutil.rmtree(bench.run.path)
        cost = made.cost
        del made, bench
        clear()
        return named | judged | cost | minutes, meta

    def open(self, cell: Cell) -> Workbench:
        """A workbench for a cell, with a run directory of its own; the model and its tokens are those of the others."""
        config = composed(cell, self.arguments)
        run, key = RunDir.open(config), tuple(config["data"]["extra"])
        if key not in self._opened:
            self._opened[key] = self._first(config, run)
            return self._opened[key]
        old = self._opened[key]
        seed_everything(config["seed"], verbose=False)
        found, calib = instantiate(config["recipe"], _convert_="all"), config["calibration"]
        bench = replace(
            old,
            config=by_device(config, old.device.type),
            run=run,
            recipe=found,
            plan=match(old.model, found),
            calibration=calibration(old.tokens, calib["samples"], calib["seq_len"], calib["batch_size"], calib["seed"]),
        )
        bench.__dict__["judged"] = old.judged
        bench.model.requires_grad_(True)  # on a CPU it is also the teacher, which training froze
        return bench

    def _first(self, config: dict[str, Any], run: RunDir) -> Workbench:
        """A workbench from nothing; the first process of all rebuilds the model from its GGUF file, others wait."""
        marker = self.kept / "rebuilt"
        with locked(marker.with_suffix(".lock")):
            if not marker.exists():
                bench = open_workbench(config, run)
                marker.touch()
                return bench
        return open_workbench(config, run)

    def _made(self, cell: Cell, bench: Workbench) -> Made:
        if cell.arm == "fp":
            return Made(bench.judged)
        if cell.arm == "ft_fp":
            folded, cost = self._fine_tuned(cell.seed, bench)
            return Made(apply(bench.judged, {}, folded), {}, cost)
        if cell.arm == "blockap":
            changes, cost = self._block_ap(cell, bench)
            return Made(
                apply(bench.judged, changes.tensors, changes.folded, recipe=bench.recipe), changes.tensors, cost
            )
        if cell.arm in TRAINED:
            return self._trained(cell, bench)
        start = bench.judged
        if cell.arm == "ft_gptq":
            start = apply(bench.judged, {}, self._fine_tuned(cell.seed)[0])
            bench = copy.copy(bench)
            bench.__dict__["judged"] = start
        changes = _method(bench, cell.arm.removeprefix("ft_"))
        changes.folded.update(static_inputs(bench, changes))
        return Made(apply(start, changes.tensors, changes.folded, recipe=bench.recipe), changes.tensors)

    def _trained(self, cell: Cell, bench: Workbench) -> Made:
        begun, before = None, {}
        if cell.arm == "blockap_qat":
            start = time.monotonic()
            begun, cost = self._block_ap(Cell(cell.recipe, "blockap", cell.seed))
            spent = (time.monotonic() - start) / 60
            before = {f"blockap_{key}": cost[key] for key in ("steps", "train_minutes")}
            before["elsewhere_minutes"] = max(cost["train_minutes"] - spent, 0.0)
        tensors, folded, _, _, cost = train(bench, [], begun)
        return Made(apply(bench.judged, tensors, folded, recipe=bench.recipe), tensors, _cost(cost) | before)

    def _block_ap(self, cell: Cell, bench: Workbench | None = None) -> tuple[Changes, Row]:
        """Block-AP; kept, since training goes on from it in another cell."""
        file = self.kept / f"{cell}.{digest(cell, self.arguments)}" / "changes.safetensors"
        with locked(file.with_suffix(".lock")):
            own = bench or self.open(cell)
            if not file.exists():
                _method(own, "blockap").save(file)
            changes = Changes.load(file, own.recipe, own.device)
            if bench is None:
                shutil.rmtree(own.run.path)
        steps, seconds = (sum(row[key] for row in changes.layers) for key in ("steps", "seconds"))
        size = own.config["arms"]["blockap"]["batch_size"] * own.config["calibration"]["seq_len"]
        first, last = (sum(row[key] for row in changes.layers) / len(changes.layers) for key in ("initial", "loss"))
        tokens = steps // len(changes.layers) * size  # that every block saw
        cost = {"steps": steps, "train_tokens": tokens, "train_minutes": seconds / 60}
        return changes, cost | {"block_loss_initial": first, "block_loss": last}

    def _fine_tuned(self, seed: int, bench: Workbench | None = None) -> tuple[Folded, Row]:
        """Full precision on the same tokens, as long; kept, since every recipe shares it."""
        cell = Cell("-", "ft_fp", seed)
        file = self.kept / f"{cell}.{digest(cell, self.arguments)}.pt"
        with locked(file.with_suffix(".lock")):
            if not file.exists():
                own = bench or self.open(cell)
                student = copy.deepcopy(own.model).to(own.device)
                optim, config = own.build("optim"), own.config
                prepare_unquantized(student, own.dtype, optim.train_embeddings)
                training = Training(seq_len=config["data"]["seq_len"], seed=config["seed"], **config["trainer"])
                loss, schedule = own.build("loss"), own.build("schedule")
                _, cost = fit(student, None, own.tokens, training, loss, schedule, optim, own.run.path, own.device)
                torch.save(
                    ({k: v.cpu() for k, v in convert(student)[1].items()}, _cost(cost)), file.with_suffix(".part")
                )
                file.with_suffix(".part").replace(file)
                if bench is None:
                    shutil.rmtree(own.run.path)
            found: tuple[Folded, Row] = torch.load(file)
        return found

    @cached_property
    def _texts(self) -> dict[str, Tokens]:
        a = self.arguments
        paths = {"test": a.tokens, "generated": a.generated, **{name: f"{a.prose}/{name}" for name in PROSE}}
        return {name: load(Path(path)) for name, path in paths.items()}

    @cached_property
    def _more(self) -> dict[str, str]:
        return {f"more_{i}": load(Path(path)).fingerprint for i, path in enumerate(self.arguments.more)}

    def _windows(self, bench: Workbench) -> dict[str, Tensor]:
        size, limit = (bench.config["evaluation"][key] for key in ("seq_len", "windows"))
        validation = {"validation": self._texts["test"].windows("validation", size)[:limit]}
        if self.arguments.tune:
            return validation
        return {name: tokens.windows("test", size, limit) for name, tokens in self._texts.items()} | validation

    def _judged(self, graph: PreTrainedModel, bench: Workbench) -> Row:
        """Perplexity, nll and KL on every text; on the test split also agreement and what paired errors need."""
        row: Row = {}
        for name, windows in self._windows(bench).items():
            scores = evaluate(graph, windows, bench.judged, bench.config["evaluation"]["batch_size"])
            assert scores.kl is not None
            assert scores.agree is not None
            nll, end = mean(scores.nll, scores.tokens), "" if name == "test" else f"_{name}"
            ppl = float(torch.tensor(nll, dtype=torch.float64).exp())
            row |= {f"ppl{end}": ppl, f"nll{end}": nll, f"kl{end}": mean(scores.kl, scores.tokens)}
            if name == "test":
                row["top1_agree"] = mean(scores.agree, scores.tokens)
                row["tokens"] = scores.tokens * len(windows)
                paired = None if graph is bench.judged else self._full(bench, windows).nll
                row["nll_se"] = standard_error(scores.nll, scores.tokens, paired)
                row["windows"] = {"nll": _short(scores.nll), "kl": _short(scores.kl)}
        return row

    def _full(self, bench: Workbench, windows: Tensor) -> Scores:
        if not hasattr(self, "_fp"):
            self._fp = evaluate(bench.judged, windows, None, bench.config["evaluation"]["batch_size"])
        return self._fp


def _method(bench: Workbench, arm: str) -> Changes:
    """What a method finds; nothing of it is kept by block, as a cell takes a minute or two."""
    changes: Changes = bench.build("arms", arm)(bench.judged, bench.recipe, bench.calibration, dtype=bench.dtype)
    return changes


def _cost(cost: Row) -> Row:
    return {"steps": cost["steps"], "train_tokens": cost["tokens"], "train_minutes": cost["seconds"] / 60}


def _short(sums: Tensor) -> list[float]:
    """Sums over the tokens of a window, to a thousandth of a nat."""
    return [round(value, 3) for value in sums.tolist()]


def clear() -> None:
    """Gives back what a cell took: Lightning's objects refer to each other, and dynamo keeps what it compiled."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
