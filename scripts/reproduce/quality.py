"""The quality table: every grid x every arm x seeds, on the demo model. Cells that the JSON holds, with the same
settings, are not run again; every row says of which commit it is.

    python scripts/reproduce/quality.py --json scripts/results/quality.json --tokens DIR --generated DIR --prose DIR \
        [--more DIR ...] [--recipes w4a16_g64 ...] [--arms rtn qat ...] [--seeds 1 2 3] [--minutes 25] [--gpus 0 1] \
        [--tune] [-- override ...]

`--tokens` is a token directory of python_docs, `--generated` one of `qat generate`, `--prose` what `texts.py` wrote.
PTQ arms calibrate on the train split of python_docs; trained arms train on it, on the generated one and on `--more`.

On each GPU one process trains, and beside it some quantize after training, since these wait for the host.
"""

import argparse
import sys
from functools import partial
from pathlib import Path

from lanes import Make, gpus, share
from quality_plan import ARMS, RECIPES, TRAINED, Board, Lane, composed, digest, plan
from results import read

from qat.cli.rundir import git

SHOWN = ("ppl", "kl", "top1_agree", "nll_validation", "kl_validation", "kl_generated", "kl_web", "kl_wives", "minutes")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("json", "tokens", "generated", "prose"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--more", nargs="*", default=[], help="token directories, for training alone")
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="W4, W3 and W2 g64; others the first")
    parser.add_argument("--minutes", type=float, default=1e6, help="after which no cell is begun")
    parser.add_argument("--gpus", nargs="+", default=None, help="as CUDA_VISIBLE_DEVICES names them; default: all")
    parser.add_argument("--ptq", type=int, default=3, help="processes on each GPU beside the one that trains")
    parser.add_argument("--work", default="runs/quality/cells", help="what is needed until the table is done")
    parser.add_argument("--tune", action="store_true", help="judge on validation alone; rows of other settings stay")
    parser.add_argument("--commit", default=None, help="of the source; default: what git says")
    parser.add_argument("overrides", nargs="*")
    found = parser.parse_args()
    found.work = str(Path(found.work).absolute())
    return found


def begin(given: argparse.Namespace) -> Make:
    """What makes cells in a process."""
    from quality_cells import Cells

    return Cells(given).row


def main() -> None:
    """Makes what is left of the table."""
    given = arguments()
    given.commit = given.commit or (git() or {}).get("sha")
    if [row for row in read(Path(given.json))["rows"] if ("kl" in row) == given.tune]:
        judged, flag = ("the test split", "without --tune") if given.tune else ("validation alone", "with --tune")
        raise SystemExit(f"--json {given.json}: its rows are judged on {judged}; go on {flag}, or give another file")
    cells = plan(given.recipes, given.arms, given.seeds)
    digests = {cell: digest(cell, given) for cell in cells}
    board = Board(Path(given.json), Path(given.work), cells, digests, given.tune)
    for cell in {cell.arm in TRAINED: cell for cell in board.cells}.values():
        try:
            composed(cell, given)
        except ValueError as error:
            raise SystemExit(str(error)) from None
    places = gpus() if given.gpus is None else given.gpus
    lanes: list[tuple[Lane, str]] = [("trained", gpu) for gpu in places]
    lanes += [("ptq", gpu) for _ in range(given.ptq) for gpu in places]
    sys.exit(share(board, lanes, given.minutes, partial(begin, given), SHOWN))


if __name__ == "__main__":
    main()
