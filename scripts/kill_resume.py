"""Kills `qat train` or `qat ptq` again and again, and compares where it ends with a run that was left alone.

    python scripts/kill_resume.py --times 10 --json FILE -- experiment=smoke [more overrides]
    python scripts/kill_resume.py --verb ptq -- method=gptq [more overrides]

Each trial starts the command, sends SIGKILL at a random moment after a random optimizer step, or block of the model,
and repeats the same command until it ends. The exported file and, of training, every fp32 tensor of the last checkpoint
must equal the unbroken run's, bit for bit; steps and blocks that were kept must not be done again.
"""

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qat.cli.rundir import git  # noqa: E402
from qat.formats.base import digest  # noqa: E402


def start(verb: str, runs: Path, overrides: list[str]) -> subprocess.Popen:
    """`qat VERB` of this source tree, its run directories below `runs`."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-u", "-m", "qat", verb, *overrides, f"runs={runs}"]
    env = os.environ | {"PYTHONPATH": path}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(verb: str, runs: Path, overrides: list[str]) -> list[str]:
    """Runs to the end; its output lines."""
    process = start(verb, runs, overrides)
    text, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"qat {verb} failed with status {process.returncode}:\n{text[-4000:]}")
    return text.splitlines()


def kill(verb: str, runs: Path, overrides: list[str], unit: int, delay: float) -> int:
    """Starts, waits until step or block `unit` is done and `delay` seconds more, and kills; the last unit seen."""
    process = start(verb, runs, overrides)
    seen = _step_seen(process, unit) if verb == "train" else _block_seen(process, runs, unit)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, f"it had ended by itself, with status {process.returncode}"
    return seen


def _step_seen(process: subprocess.Popen, step: int) -> int:
    """Waits until training says that a step is done; the last one that it spoke of."""
    seen = 0
    assert process.stdout is not None
    for line in process.stdout:
        words = line.split()
        if len(words) > 1 and words[0] == "step":
            seen = int(words[1].partition("/")[0])
            if seen >= step:
                break
    return seen


def _block_seen(process: subprocess.Popen, runs: Path, block: int) -> int:
    """Waits until so many blocks are kept; how many there are."""
    while (seen := len(blocks(runs))) < block and process.poll() is None:
        time.sleep(0.005)
    return seen


def blocks(runs: Path) -> dict[Path, int]:
    """The files in which the only run below `runs` keeps finished blocks, to when they were written (ns)."""
    return {path: path.stat().st_mtime_ns for path in sorted(runs.glob("*/*/checkpoints/**/block-*.safetensors"))}


def digests(verb: str, runs: Path) -> dict[str, str]:
    """SHA-256 of what the only run below `runs` exported, and of each fp32 tensor that its training ended with."""
    (run,) = [path.parent for path in runs.glob("*/*/run.json")]
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in run.glob("export/*/*.safetensors")}
    assert found, f"{run}: nothing was exported"
    if verb == "ptq":
        return found
    state = torch.load(max(run.glob("checkpoints/step=*.ckpt"), key=_step), weights_only=True)["state_dict"]
    assert state, f"{run}: an empty checkpoint"
    return found | {name: digest(value) for name, value in state.items()}


def measured(verb: str, runs: Path, lines: list[str], seconds: float) -> tuple[int, float]:
    """How many steps or blocks a finished run had, and about how long each of them took."""
    if verb == "train":
        steps = max(int(line.split()[1].partition("/")[2]) for line in lines if line.split()[:1] == ["step"])
        return steps, seconds / (4 * steps)
    times = sorted(blocks(runs).values())
    if len(times) < 2:
        raise SystemExit(f"{len(times)} blocks were kept; there is nothing to resume: take a method that walks blocks")
    return len(times), (times[-1] - times[0]) / 1e9 / (len(times) - 1)


def trial(verb: str, runs: Path, overrides: list[str], unit: int, delay: float, units: int) -> tuple[int, int]:
    """One run that is killed and repeated; the last unit seen, and how many it did not do again.

    It takes up all that was kept: of training the last checkpoint, of a walk every finished block.
    """
    seen = kill(verb, runs, overrides, unit, delay)
    if verb == "ptq":
        kept = blocks(runs)
        finish(verb, runs, overrides)
        again = [path.name for path, when in blocks(runs).items() if kept.get(path, when) != when]
        assert not again, f"{again[0]} was kept, and written again"
        return seen, len(kept)
    saved = max((_step(path) for path in runs.glob("*/*/checkpoints/step=*.ckpt")), default=0)
    lines = finish(verb, runs, overrides)
    resumed = [int(line.split()[-1]) for line in lines if line.strip().startswith("resumed at step")]
    assert resumed == ([saved] if 0 < saved < units else []), f"{saved} steps were kept; it resumed at {resumed}"
    return seen, saved


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step="))


def main() -> int:
    """Exit 0 only if every trial ended where the unbroken run did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--verb", choices=["train", "ptq"], default="train")
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("overrides", nargs="*", default=["experiment=smoke"])
    args = parser.parse_args()
    moments, rows, unit = random.Random(args.seed), [], "step" if args.verb == "train" else "block"
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        begin = time.monotonic()
        lines = finish(args.verb, root / "unbroken", args.overrides)
        units, per_unit = measured(args.verb, root / "unbroken", lines, time.monotonic() - begin)
        expected = digests(args.verb, root / "unbroken")
        for number in range(args.times):
            runs, wanted, delay = root / str(number), moments.randrange(1, units), moments.uniform(0, per_unit)
            seen, saved = trial(args.verb, runs, args.overrides, wanted, delay, units)
            equal = digests(args.verb, runs) == expected
            rows.append({f"killed_after_{unit}": seen, "resumed_at": saved, "equal": equal})
            print(f"trial {number}: killed after {unit} {seen} of {units}, resumed at {saved}, "
                  f"{'equal' if equal else 'DIFFERENT'}", flush=True)  # fmt: skip
    print(f"{sum(row['equal'] for row in rows)} of {args.times} equal, bit for bit")
    if args.json:
        meta = {"overrides": args.overrides, f"{unit}s": units, "date": time.strftime("%Y-%m-%d"), "git": git()}
        args.json.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["equal"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
