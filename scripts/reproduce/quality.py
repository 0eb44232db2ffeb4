"""The quality table: every grid x every arm x seeds, on the demo model. Cells that the JSON holds are not run again.

    python scripts/reproduce/quality.py --json scripts/results/quality.json --tokens DIR --generated DIR --prose DIR \
        [--recipes w4a16_g64 ...] [--arms rtn qat ...] [--seeds 1 2 3] [--minutes 25] [--gpus 0 1] [-- override ...]

`--tokens` is a token directory of python_docs, `--generated` one of `qat generate`, `--prose` what `texts.py` wrote.
PTQ arms calibrate on the train split of python_docs, trained arms train on it and on the generated one.

On each GPU one process trains, and beside it some quantize after training, since these wait for the host. A cell that
fails is reported and given up, and with it those that need it; the others go on, and the exit code is 1.
"""

import argparse
import multiprocessing
import os
import sys
import time
import traceback
from multiprocessing.connection import wait
from pathlib import Path

from quality_plan import ARMS, RECIPES, TRAINED, Board, Lane, composed, plan

from qat.cli.rundir import git

FAILED = 3  # a process ends with a cell that fails: what the error left behind, on the GPU too, goes with it
SHOWN = ("ppl", "kl", "top1_agree", "kl_validation", "kl_generated", "kl_web", "kl_wives", "minutes")


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("json", "tokens", "generated", "prose"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES), choices=list(RECIPES))
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3], help="W4, W3 and W2 g64; others the first")
    parser.add_argument("--minutes", type=float, default=1e6, help="after which no cell is begun")
    parser.add_argument("--gpus", nargs="+", default=None, help="as CUDA_VISIBLE_DEVICES names them; default: all")
    parser.add_argument("--ptq", type=int, default=3, help="processes on each GPU beside the one that trains")
    parser.add_argument("--work", default="runs/quality/cells", help="what is needed until the table is done")
    parser.add_argument("--commit", default=None, help="of the source; default: what git says")
    parser.add_argument("overrides", nargs="*")
    found = parser.parse_args()
    found.work = str(Path(found.work).absolute())
    return found


def work(lane: Lane, gpu: str, threads: int, until: float, board: Board, given: argparse.Namespace) -> None:
    """Makes cells until there are none for this lane, time is up or one fails: a process of its own."""
    if board.finished(lane):
        return
    os.environ |= {"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": str(threads)}
    from quality_cells import Cells, clear  # only now: torch looks at the environment once

    cells = Cells(given)
    while time.time() < until and not board.finished(lane):
        claim = board.claim(lane)
        if claim is None:
            time.sleep(1)  # for what others are at
            continue
        try:
            row, meta = cells.row(claim.cell)
        except Exception as error:
            traceback.print_exc()
            board.fail(claim.cell, f"{type(error).__name__}: {error}")
            sys.exit(FAILED)
        board.add(row, meta)
        claim.release()
        shown = "  ".join(f"{key} {row[key]:.4f}" for key in SHOWN)
        print(f"{time.strftime('%H:%M:%S')} {claim.cell!s:26} {shown}", flush=True)
        clear()


def main() -> None:
    """Starts the processes, waits for them, and says what is left."""
    given = arguments()
    given.commit = given.commit or (git() or {}).get("sha")
    board = Board(Path(given.json), Path(given.work), plan(given.recipes, given.arms, given.seeds))
    for cell in {cell.arm in TRAINED: cell for cell in board.cells}.values():
        try:
            composed(cell, given)
        except ValueError as error:
            raise SystemExit(str(error)) from None
    board.work.mkdir(parents=True, exist_ok=True)
    board.forgive()
    gpus = _gpus() if given.gpus is None else given.gpus
    lanes: list[tuple[Lane, str]] = [("trained", gpu) for gpu in gpus]
    lanes += [("ptq", gpu) for _ in range(given.ptq) for gpu in gpus]
    threads = max((os.cpu_count() or 1) // len(lanes), 1)
    until, context = time.time() + 60 * given.minutes, multiprocessing.get_context("spawn")

    def begin(lane: Lane, gpu: str) -> multiprocessing.process.BaseProcess:
        process = context.Process(target=work, args=(lane, gpu, threads, until, board, given))
        process.start()
        return process

    running, crashed = {begin(*lane): lane for lane in lanes}, 0
    while running:
        ended = set(wait([process.sentinel for process in running]))
        for process in [p for p in running if p.sentinel in ended]:
            process.join()
            lane = running.pop(process)
            if process.exitcode == FAILED:
                running[begin(*lane)] = lane
            elif process.exitcode:
                crashed += 1
    failures, done = board.failures(), board.done()
    for cell, reason in failures.items():
        print(f"{cell} failed: {reason}")
    if crashed:
        print(f"{crashed} processes crashed")
    print(f"{len(done.intersection(board.cells))} of {len(board.cells)} cells are done; the same command goes on")
    sys.exit(1 if failures or crashed else 0)


def _gpus() -> list[str]:
    """What this process may use, as processes below it name them; none: the CPU, as one place."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu for gpu in visible.split(",") if gpu] or [""]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())] or [""]


if __name__ == "__main__":
    main()
