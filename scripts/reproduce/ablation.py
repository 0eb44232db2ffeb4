"""What Block-AP trains, at 2 bits: EfficientQAT's ablation (arXiv:2407.11062, table 6) on the demo model.

    python scripts/reproduce/ablation.py --json scripts/results/ablation_w2.json --tokens DIR \
        [--train s,z,W W ...] [--starts minmax mse] [--losses relative plain] [--seeds 1 2 3] [-- override ...]

Asymmetric groups of 64, so that there are zero points. The paper starts from the min-max range and trains for the plain
MSE; both are done beside what is ours, the searched range and the error relative to the token. Norms stay, so that what
is compared differs in nothing else. Cells that the JSON holds are not run again.
"""

import argparse
import sys
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from lanes import Make, gpus, share
from quality_plan import Board, Cell, Lane
from results import Row, read, write

from qat.cli.rundir import git
from qat.cli.tree import Tree
from qat.cli.validate import validate
from qat.cli.verbs import VERBS

TRAIN = {"s,z,W": "[scales,zeros,weights]", "s,z,round": "[scales,zeros,round]", "s,z": "[scales,zeros]",
         "W": "[weights]"}  # fmt: skip
STARTS = ("minmax", "mse")
LOSSES = {"plain": "false", "relative": "true"}
COMMON = ["recipe=w2a16_g64_asym", "estimator=efficientqat", "format=none", "logger=none", "resume=never",
          "calibration.samples=512", "calibration.batch_size=8", "evaluation.batch_size=8",
          "+method@arms.blockap=blockwise", "arms.blockap.epochs=4", "arms.blockap.batch_size=8"]  # fmt: skip
SHOWN = ("initial", "loss", "block_relative", "block_mse", "ppl", "kl", "minutes")
COLUMNS = {"loss": 4, "block_relative": 4, "block_mse": 3, "ppl": 2, "kl": 4}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("json", "tokens"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--train", nargs="+", default=list(TRAIN), choices=list(TRAIN))
    parser.add_argument("--starts", nargs="+", default=list(STARTS), choices=STARTS)
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=list(LOSSES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--minutes", type=float, default=1e6, help="after which no cell is begun")
    parser.add_argument("--gpus", nargs="+", default=None, help="as CUDA_VISIBLE_DEVICES names them; default: all")
    parser.add_argument("--processes", type=int, default=3, help="on each GPU")
    parser.add_argument("--blocks", type=int, default=None, help="of the model, the first ones; default: all")
    parser.add_argument("--work", default="runs/ablation")
    parser.add_argument("--commit", default=None, help="of the source; default: what git says")
    parser.add_argument("overrides", nargs="*")
    found = parser.parse_args()
    found.work = str(Path(found.work).absolute())
    return found


def composed(cell: Cell, given: argparse.Namespace) -> dict[str, Any]:
    """The config of a cell.

    Raises:
        ValueError: An override does not fit.
    """
    start, loss = cell.recipe.split("-")
    own = [f"observer={start}", f"arms.blockap.relative={LOSSES[loss]}", f"arms.blockap.train={TRAIN[cell.arm]}"]
    own += [
        f"seed={cell.seed}",
        f"calibration.seed={cell.seed}",
        f"data.path={given.tokens}",
        f"runs={given.work}/runs",
    ]
    config, problems = validate(VERBS["run"], [*COMMON, *own, *given.overrides], Tree.of([]))
    if problems:
        raise ValueError("\n".join(f"{problem}" for problem in problems))
    return config


def begin(given: argparse.Namespace) -> Make:
    """What makes cells in a process."""
    from ablation_cells import Cells

    return Cells(given).row


def summary(rows: list[Row]) -> list[Row]:
    """Means and spreads over seeds, by start, loss and what trains."""
    found = []
    for named in dict.fromkeys((row["start"], row["trained_for"], row["arm"]) for row in rows):
        mine = [row for row in rows if (row["start"], row["trained_for"], row["arm"]) == named]
        one: Row = dict(zip(("start", "trained_for", "arm"), named, strict=True)) | {"seeds": len(mine)}
        for key in ("initial", *COLUMNS):
            values = [row[key] for row in mine]
            one |= {key: mean(values), f"{key}_spread": stdev(values) if len(values) > 1 else None}
        found.append(one)
    order = list(TRAIN)
    return sorted(found, key=lambda one: (one["start"], one["trained_for"], order.index(one["arm"])))


def table(means: list[Row]) -> str:
    """Markdown: mean and spread."""
    lines = [["start", "trained for", "what trains", *COLUMNS], ["---"] * (3 + len(COLUMNS))]
    for one in means:
        cells = [one["start"], one["trained_for"], one["arm"]]
        for key, digits in COLUMNS.items():
            some = one[f"{key}_spread"]
            cells.append(f"{one[key]:.{digits}f}" + ("" if some is None else f" ± {some:.{digits}f}"))
        lines.append(cells)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> None:
    """Makes what is left, writes the summary and prints the table."""
    given = arguments()
    given.commit = given.commit or (git() or {}).get("sha")
    named = [(f"{start}-{loss}", arm) for start in given.starts for loss in given.losses for arm in given.train]
    cells = [Cell(recipe, arm, seed) for seed in given.seeds for recipe, arm in named]
    board = Board(Path(given.json), Path(given.work), cells)
    try:
        composed(cells[0], given)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    lanes: list[tuple[Lane, str]] = [("ptq", gpu) for _ in range(given.processes) for gpu in given.gpus or gpus()]
    code = share(board, lanes, given.minutes, partial(begin, given), SHOWN)
    content = read(board.file)
    content["summary"] = summary(content["rows"])
    write(board.file, content)
    print(f"\n<!-- from: {given.json} -->\n{table(content['summary'])}")
    sys.exit(code)


if __name__ == "__main__":
    main()
