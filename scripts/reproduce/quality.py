"""The quality table: every grid x every arm x seeds, on the demo model. Cells that the JSON holds are not run again.

    python scripts/reproduce/quality.py --json scripts/results/quality.json --tokens DIR --generated DIR --prose DIR \
        [--recipes w4a16_g64 ...] [--arms rtn qat ...] [--seeds 1 2 3] [--minutes 25] [-- override ...]

`--tokens` is a token directory of python_docs, `--generated` one of `qat generate`, `--prose` what `texts.py` wrote.
PTQ arms calibrate on, and trained arms train on, the train split of python_docs; trained arms on the generated one too.
"""

import argparse
import copy
import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from qat.cli.arms import quantize, static_inputs, train
from qat.cli.rundir import versions
from qat.cli.tree import Tree
from qat.cli.validate import validate
from qat.cli.verbs import VERBS
from qat.cli.workbench import Workbench, open_workbench
from qat.data.text import load
from qat.evaluation.divergence import evaluate, mean, standard_error
from qat.surgery.convert import Folded, Tensors, apply, convert
from qat.surgery.prepare import prepare_unquantized
from qat.training.fit import Training, fit

PTQ = ("rtn", "mse_rtn", "gptq", "awq")
TRAINED = {  # arm: what it adds to the settings of its recipe
    "qat": ["loss=kl"],
    "qat_ce": ["loss=ce"],
    "blockap_qat": ["loss=kl", "init=blockwise"],
}
ARMS = ("fp", "ft_fp", *PTQ, "ft_gptq", *TRAINED, "blockap")
RECIPES: dict[str, list[str]] = {  # tuned on the validation split
    "w4a16_g64": ["optim.lr=2e-4"],
    "w3a16_g64": ["optim.lr=4e-4"],
    "w2a16_g64": ["optim.lr=8e-4"],
    "w4a16_channel": ["optim.lr=2e-4"],
    "w8a8": ["optim.lr=1e-4"],
    "w4a8": ["optim.lr=2e-4"],
    "nvfp4a16": ["optim.lr=2e-4"],
    "nvfp4": ["optim.lr=2e-4"],
}
COMMON = ["format=none", "logger=none", "resume=never", "calibration.samples=128", "calibration.batch_size=8",
          "trainer.batch_size=32", "trainer.max_steps=400", "trainer.checkpoint_every=400", "trainer.val_every=400",
          "evaluation.windows=24", "evaluation.batch_size=8"]  # fmt: skip


@dataclass
class Cell:
    """One entry of the table, on a workbench of its own."""

    bench: Workbench
    recipe: str
    arm: str
    seed: int
    store: Path

    def graph(self) -> tuple[PreTrainedModel, Tensors]:
        """What is judged, and its quantized tensors."""
        bench = self.bench
        if self.arm == "fp":
            return bench.judged, {}
        if self.arm == "ft_fp":
            return apply(bench.judged, {}, self.fine_tuned()), {}
        if self.arm in TRAINED:
            tensors, folded, *_ = train(bench, [])
            return apply(bench.judged, tensors, folded, recipe=bench.recipe), tensors
        name, start = self.arm.removeprefix("ft_"), bench.judged
        if self.arm == "ft_gptq":
            start = apply(bench.judged, {}, self.fine_tuned())
            bench = copy.copy(bench)
            bench.__dict__["judged"] = start
        changes = quantize(bench, name, bench.config["arms"][name])
        changes.folded.update(static_inputs(bench, changes))
        return apply(start, changes.tensors, changes.folded, recipe=bench.recipe), changes.tensors

    def fine_tuned(self) -> Folded:
        """Full precision on the same tokens, as long; kept, since every recipe shares it."""
        file = self.store / f"ft_fp_{self.seed}.pt"
        if not file.exists():
            bench, config = self.bench, self.bench.config
            student = copy.deepcopy(bench.model).to(bench.device)
            optim = bench.build("optim")
            prepare_unquantized(student, bench.dtype, optim.train_embeddings)
            training = Training(seq_len=config["data"]["seq_len"], seed=config["seed"], **config["trainer"])
            loss, schedule = bench.build("loss"), bench.build("schedule")
            fit(student, None, bench.tokens, training, loss, schedule, optim, bench.run.path, bench.device)
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save({k: v.cpu() for k, v in convert(student)[1].items()}, file)
        found: Folded = torch.load(file)
        return found


def settings(recipe: str, arm: str, seed: int, arguments: argparse.Namespace) -> list[str]:
    """The overrides that make a cell."""
    mine = [f"recipe={recipe}", f"seed={seed}", f"calibration.seed={seed}", f"data.path={arguments.tokens}"]
    if arm in TRAINED or arm.startswith("ft_"):
        mine += [f"data.extra=[{arguments.generated}]"]
    loss = ["loss=ce"] if arm.startswith("ft_") else TRAINED.get(arm, [])
    methods = ["+method@arms.mse_rtn=mse_rtn", "+method@arms.blockap=blockwise"]
    return [*COMMON, *methods, *RECIPES[recipe], *mine, *loss, *arguments.overrides]


def open_cell(recipe: str, arm: str, seed: int, arguments: argparse.Namespace) -> Cell:
    """A cell, ready to run."""
    config, problems = validate(VERBS["run"], settings(recipe, arm, seed, arguments), Tree.of([]))
    if problems:
        raise SystemExit("\n".join(f"{p}" for p in problems))
    return Cell(open_workbench(config), recipe, arm, seed, Path(config["runs"]) / "fine_tuned")


def judge(graph: PreTrainedModel, bench: Workbench, texts: dict[str, Tensor]) -> dict[str, Any]:
    """Perplexity, nll, KL and agreement on every text; per-window sums on the first, for paired errors."""
    row: dict[str, Any] = {}
    for name, windows in texts.items():
        scores = evaluate(graph, windows, bench.judged, bench.config["evaluation"]["batch_size"])
        assert scores.kl is not None
        assert scores.agree is not None
        nll, end = mean(scores.nll, scores.tokens), "" if name == "test" else f"_{name}"
        row |= {
            f"nll{end}": nll,
            f"ppl{end}": float(torch.tensor(nll).exp()),
            f"kl{end}": mean(scores.kl, scores.tokens),
        }
        if name == "test":
            row["top1_agree"] = mean(scores.agree, scores.tokens)
            row["nll_se"] = standard_error(scores.nll, scores.tokens)
            row["windows"] = {"nll": scores.nll.tolist(), "kl": scores.kl.tolist()}
    return row


def cells(arguments: argparse.Namespace, done: list[dict[str, Any]]) -> Iterator[tuple[str, str, int]]:
    """What is asked for and not there yet; fp and ft_fp do not depend on the recipe."""
    have = {(row["recipe"], row["arm"], row["seed"]) for row in done}
    for seed in arguments.seeds:
        for recipe in arguments.recipes:
            for arm in arguments.arms:
                key = ("-" if arm in ("fp", "ft_fp") else recipe, arm, 0 if arm == "fp" else seed)
                if key not in have:
                    have.add(key)
                    yield recipe, arm, seed


def main() -> None:
    """Runs cells until they are done or the minutes are over, and writes each as it ends."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("json", "tokens", "generated", "prose"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1])
    parser.add_argument("--minutes", type=float, default=1e9)
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_args()
    file, start = Path(arguments.json), time.monotonic()
    table = json.loads(file.read_text()) if file.exists() else {"meta": {}, "rows": []}
    for recipe, arm, seed in cells(arguments, table["rows"]):
        if time.monotonic() - start > 60 * arguments.minutes:
            print("out of time; the same command goes on")
            break
        began = time.monotonic()
        cell = open_cell(recipe, arm, seed, arguments)
        bench, texts = cell.bench, {"test": cell.bench.windows}
        texts["validation"] = bench.tokens.windows("validation", 512)
        texts["generated"] = load(Path(arguments.generated)).windows("test", 512, 24)
        texts |= {n: load(Path(arguments.prose) / n).windows("test", 512, 24) for n in ("web", "wives")}
        graph, tensors = cell.graph()
        count = sum(t.codes.numel() for t in tensors.values())
        bits = sum(t.bits for t in tensors.values()) / count if count else 16.0
        named = {"recipe": "-" if arm in ("fp", "ft_fp") else recipe, "arm": arm, "seed": 0 if arm == "fp" else seed}
        minutes = {"bits_per_quantized_weight": bits, "minutes": (time.monotonic() - began) / 60}
        row = named | judge(graph, bench, texts) | minutes
        table["rows"].append(row)
        facts, data = bench.run.facts, {"test": bench.tokens.fingerprint}
        data |= {n: load(Path(p)).fingerprint for n, p in (("generated", arguments.generated),)}
        data |= {n: load(Path(arguments.prose) / n).fingerprint for n in ("web", "wives")}
        table["meta"] = {"device": facts["device"], "versions": versions(), "git": facts["git"], "data": data,
                         "common": COMMON, "recipes": RECIPES, "overrides": arguments.overrides}  # fmt: skip
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(table, indent=1) + "\n")
        shutil.rmtree(bench.run.path)
        shown = ("ppl", "kl", "top1_agree", "kl_validation", "kl_generated", "kl_web", "kl_wives", "minutes")
        print(f"{recipe:14} {arm:12} {seed}  " + "  ".join(f"{key} {row[key]:.4f}" for key in shown), flush=True)
        del graph, tensors, cell, bench


if __name__ == "__main__":
    main()
