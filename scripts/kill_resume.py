"""Kills `qat train` again and again, and compares where it ends with a run that was left alone.

    python scripts/kill_resume.py --times 10 --json FILE -- experiment=smoke [more overrides]

Each trial starts `qat train`, sends SIGKILL at a random moment of its training, and repeats the same command until it
ends. The exported file and every fp32 tensor of the last checkpoint must equal the unbroken run's, bit for bit.
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


def start(runs: Path, overrides: list[str]) -> subprocess.Popen:
    """`qat train` of this source tree, its run directories below `runs`."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-u", "-m", "qat", "train", *overrides, f"runs={runs}"]
    env = os.environ | {"PYTHONPATH": path}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(runs: Path, overrides: list[str]) -> list[str]:
    """Runs to the end; its output lines."""
    process = start(runs, overrides)
    text, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"qat train failed with status {process.returncode}:\n{text[-4000:]}")
    return text.splitlines()


def kill(runs: Path, overrides: list[str], step: int, delay: float) -> int:
    """Starts, waits until optimizer step `step` and `delay` seconds more, and kills; the last step seen."""
    process, seen = start(runs, overrides), 0
    assert process.stdout is not None
    for line in process.stdout:
        words = line.split()
        if len(words) > 1 and words[0] == "step":
            seen = int(words[1].partition("/")[0])
            if seen >= step:
                break
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, f"it had ended by itself, with status {process.returncode}"
    return seen


def digests(runs: Path) -> dict[str, str]:
    """SHA-256 of what the only run below `runs` exported, and of each fp32 tensor that its training ended with."""
    (run,) = [path.parent for path in runs.glob("*/*/run.json")]
    found = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in run.glob("export/*/*.safetensors")}
    state = torch.load(max(run.glob("checkpoints/step=*.ckpt"), key=_step), weights_only=True)["state_dict"]
    assert found, f"{run}: nothing was exported"
    assert state, f"{run}: an empty checkpoint"
    return found | {name: digest(value) for name, value in state.items()}


def _step(path: Path) -> int:
    return int(path.stem.removeprefix("step="))


def main() -> int:
    """Exit 0 only if every trial ended where the unbroken run did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("overrides", nargs="*", default=["experiment=smoke"])
    args = parser.parse_args()
    moments, rows = random.Random(args.seed), []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        begin = time.monotonic()
        lines = finish(root / "unbroken", args.overrides)
        steps = max(int(line.split()[1].partition("/")[2]) for line in lines if line.split()[:1] == ["step"])
        per_step = (time.monotonic() - begin) / (4 * steps)
        expected = digests(root / "unbroken")
        for trial in range(args.times):
            runs = root / str(trial)
            wanted, delay = moments.randrange(1, steps), moments.uniform(0, per_step)
            seen = kill(runs, args.overrides, wanted, delay)
            saved = max((_step(path) for path in runs.glob("*/*/checkpoints/step=*.ckpt")), default=0)
            lines = finish(runs, args.overrides)
            resumed = [int(line.split()[-1]) for line in lines if line.strip().startswith("resumed at step")]
            assert resumed == ([saved] if 0 < saved < steps else []), (
                f"{saved} steps were kept; it resumed at {resumed}"
            )
            equal = digests(runs) == expected
            rows.append({"killed_after_step": seen, "resumed_at": saved, "equal": equal})
            print(f"trial {trial}: killed after step {seen} of {steps}, resumed at {rows[-1]['resumed_at']}, "
                  f"{'equal' if equal else 'DIFFERENT'}", flush=True)  # fmt: skip
    print(f"{sum(row['equal'] for row in rows)} of {args.times} equal, bit for bit")
    if args.json:
        meta = {"overrides": args.overrides, "steps": steps, "date": time.strftime("%Y-%m-%d"), "git": git()}
        args.json.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0 if all(row["equal"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
