"""Processes that share out the cells of a board between them: one for each lane and GPU.

A cell that fails is reported and given up, and with it those that need it; the others go on.
"""

import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from typing import Any

from quality_plan import Board, Cell, Lane
from results import Row

FAILED = 3  # a process ends with a cell that fails: what the error left behind, on the GPU too, goes with it
Make = Callable[[Cell], tuple[Row, dict[str, Any]]]  # a cell -> its row, and what the file says of all rows


def share(
    board: Board, lanes: list[tuple[Lane, str]], minutes: float, begin: Callable[[], Make], shown: Sequence[str]
) -> int:
    """Makes what is pending, or as much as is begun in time.

    Args:
        board: The cells.
        lanes: A process for each: what it takes, and its GPU, "" for none.
        minutes: After which no cell is begun.
        begin: Called in each process, before which torch must not be imported there; what it returns makes cells.
        shown: Keys of a row to print, where it has them.

    Returns:
        The exit code: 1 if anything failed.
    """
    board.work.mkdir(parents=True, exist_ok=True)
    board.forgive()
    threads, context = max((os.cpu_count() or 1) // len(lanes), 1), multiprocessing.get_context("spawn")
    until = time.time() + 60 * minutes

    def process(lane: Lane, gpu: str) -> multiprocessing.process.BaseProcess:
        started = context.Process(target=_work, args=(lane, gpu, threads, until, board, begin, shown))
        started.start()
        return started

    running, crashed = {process(*lane): lane for lane in lanes}, 0
    while running:
        ended = set(wait([each.sentinel for each in running]))
        for each in [p for p in running if p.sentinel in ended]:
            each.join()
            lane = running.pop(each)
            if each.exitcode == FAILED:
                running[process(*lane)] = lane
            elif each.exitcode:
                crashed += 1
    failures, done = board.failures(), board.done()
    for cell, reason in failures.items():
        print(f"{cell} failed: {reason}")
    if crashed:
        print(f"{crashed} processes crashed")
    print(f"{len(done.intersection(board.cells))} of {len(board.cells)} cells are done; the same command goes on")
    return 1 if failures or crashed else 0


def _work(
    lane: Lane, gpu: str, threads: int, until: float, board: Board, begin: Callable[[], Make], shown: Sequence[str]
) -> None:
    """A process: makes cells until there are none for its lane, time is up or one fails."""
    if board.finished(lane):
        return
    os.environ |= {"CUDA_VISIBLE_DEVICES": gpu, "OMP_NUM_THREADS": str(threads)}
    make = begin()
    while time.time() < until and not board.finished(lane):
        claim = board.claim(lane)
        if claim is None:
            time.sleep(1)  # for what others are at
            continue
        try:
            row, meta = make(claim.cell)
        except Exception as error:
            traceback.print_exc()
            board.fail(claim.cell, f"{type(error).__name__}: {error}")
            sys.exit(FAILED)
        board.add(row, meta)
        claim.release()
        values = "  ".join(f"{key} {row[key]:.4f}" for key in shown if key in row)
        print(f"{time.strftime('%H:%M:%S')} {claim.cell!s:28} {values}", flush=True)


def gpus() -> list[str]:
    """What this process may use, as those below it name them; without any, the CPU as one place."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu for gpu in visible.split(",") if gpu] or [""]
    import torch

    return [str(index) for index in range(torch.cuda.device_count())] or [""]
