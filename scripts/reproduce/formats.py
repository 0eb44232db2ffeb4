"""Every grid and every format on the demo model: rounded to nearest, exported, and held to its certificate.

    python scripts/reproduce/formats.py --json scripts/results/formats.json [--work DIR] [--again] [cell ...]

A cell is `qat ptq`, which reads back what it wrote and checks it; and, with `--again`, `qat verify` of that in a new
process, which is the same check and takes as long. Cells that the JSON holds are not made again, unless they failed.
Exit 0 only if every cell that was asked for is verified, or refused where its format cannot say it exactly.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results import Row, read, write

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from qat.cli.rundir import git, versions  # noqa: E402

COMMON = ["method=rtn", "calibration.samples=2", "calibration.seq_len=256", "evaluation.windows=1",
          "evaluation.seq_len=256", "generate.max_tokens=1", "logger=none", "device=cpu", "resume=never"]  # fmt: skip
SHORT = ("observer=short", "method.observer=${observer}")
FINE = ("VERIFIED", "refused")
WEIGHT = "recipe.rules.linears.weight"
COLUMNS = {"bits": ("bits_per_quantized_weight", ".2f"), "MB": ("mb", ".1f"), "engine": ("engine_logit_diff", ".1e"),
           "other readers": ("reader_logit_diff", ".1e"), "fast path, KL": ("fast_path_kl", ".1e"),
           "seconds": ("seconds", ".0f")}  # fmt: skip


@dataclass(frozen=True)
class Cell:
    """What is exported: recipe and format, and the reason, in part, why the format cannot say it where it cannot."""

    name: str
    overrides: tuple[str, ...]
    refused: str | None = None


def _weights(bits: int, symmetric: bool, format: str = "compressed_tensors", size: int = 64) -> Cell:
    own = [f"{WEIGHT}.grid.bits={bits}", f"{WEIGHT}.granularity.group_size={size}", f"{WEIGHT}.symmetric={symmetric}"]
    refused = "is none that fp16 holds" if (format, symmetric) == ("gguf", False) else None
    name = f"w{bits}a16_g{size}{'' if symmetric else '_asym'} {format}"
    return Cell(name, ("recipe=w4a16_g64", *own, f"format={format}"), refused)


CELLS = (
    *(Cell(name, (f"recipe={name}",)) for name in ("w8a8", "w8a8_static", "w4a8", "fp8", "fp8_static")),
    *(Cell(name, (f"recipe={name}",)) for name in ("nvfp4a16", "nvfp4", "mxfp4a16", "mxfp8", "w4a16_channel")),
    Cell("mixed", ("recipe=scripts/reproduce/mixed.yaml",)),
    Cell("w4a16_g64 int8 cache", ("recipe=w4a16_g64", "kv=int8")),
    *(_weights(bits, symmetric) for bits in (4, 3, 2) for symmetric in (True, False)),
    *(_weights(4, symmetric, name) for name in ("gptq", "awq") for symmetric in (True, False)),
    *(_weights(bits, symmetric, "gguf", 32) for bits, symmetric in ((4, True), (8, True), (4, False))),
    Cell("w4a16_g32_asym gguf short", (*_weights(4, False, "gguf", 32).overrides, *SHORT)),
)


def made(cell: Cell, work: Path, again: bool) -> Row:
    """The row of a cell: its verdict, and what was measured on the way."""
    start, runs = time.monotonic(), work / cell.name.replace(" ", "-")
    shutil.rmtree(runs, ignore_errors=True)
    said = qat("ptq", *COMMON, *cell.overrides, f"runs={runs}")
    row: Row = {"cell": cell.name, "overrides": list(cell.overrides), "commit": (git() or {}).get("sha")}
    if exports := [path.parent for path in runs.glob("*/*/export/*/verify.json")]:
        row |= read_export(exports[0], qat("verify", str(exports[0]), "device=cpu") if again else said)
    else:
        row |= {"verdict": "refused" if cell.refused and cell.refused in said else "FAILED", "reason": said}
    shutil.rmtree(runs, ignore_errors=True)
    return row | {"again": again, "seconds": time.monotonic() - start}


def qat(*arguments: str) -> str:
    """The last line of what a command said, which is why it failed where it did."""
    command = [sys.executable, "-m", "qat", *arguments]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    done = subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return (done.stdout.strip().splitlines() or [f"nothing, and ended with {done.returncode}"])[-1]


def read_export(path: Path, said: str) -> Row:
    """What an export is, and what its certificate says, now that it was checked again."""
    certificate = json.loads((path / "verify.json").read_text(encoding="utf-8"))
    summary = json.loads((path.parents[1] / "summary.json").read_text(encoding="utf-8"))
    config = json.loads((path / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    size = sum(file.stat().st_size for file in path.iterdir() if file.suffix in (".safetensors", ".gguf"))
    named = [config[key] for key in ("quant_method", "format", "checkpoint_format") if key in config]
    arm = {key: summary["arms"]["rtn"][key] for key in ("bits_per_quantized_weight", "kl")}
    return {"format": " ".join(named), **arm, "mb": size / 1e6} | judged(certificate, said)


def judged(certificate: dict[str, Any], said: str) -> Row:
    """The verdict, and the largest difference of logits from the reference's in our engine and in other readers."""
    checks = certificate["checks"]
    failed = [name for name, check in checks.items() if name != "fast_path" and not check["passed"]]
    readers = {name: check for name, check in checks.items() if "max_abs_diff" in check}
    logits = [check["max_abs_logit_diff"] for check in readers.values() if "max_abs_logit_diff" in check]
    engine = checks.get("engine", {})
    return {
        "verdict": "VERIFIED" if certificate["verified"] and not failed else f"FAILED: {', '.join(failed) or said}",
        "readers": list(readers),
        "reader_weight_diff": max((check["max_abs_diff"] for check in readers.values()), default=None),
        "reader_logit_diff": max(logits, default=None),
        "engine_logit_diff": engine.get("max_abs_logit_diff"),
        "max_abs_logit": engine.get("max_abs_logit"),
        "engine_max_kl": engine.get("max_kl"),
        "greedy_equal": engine.get("greedy_equal"),
        "fast_path_kl": checks.get("fast_path", {}).get("kl"),
        "unchecked": certificate["unchecked"],
    }


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [["cell", "format", "verdict", *COLUMNS], ["---"] * (3 + len(COLUMNS))]
    for row in rows:
        cells = ["—" if row.get(key) is None else format(row[key], how) for key, how in COLUMNS.values()]
        lines.append([f"`{row['cell']}`", row.get("format", "—"), row["verdict"], *cells])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    """Makes what is left, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/formats"))
    parser.add_argument("--again", action="store_true", help="`qat verify` as well")
    parser.add_argument("cells", nargs="*")
    given, named = parser.parse_args(), {cell.name: cell for cell in CELLS}
    if unknown := set(given.cells) - set(named):
        parser.error(f"no cell {min(unknown)}; one of {', '.join(named)}")
    cells = [named[name] for name in given.cells or named]
    for cell in cells:
        content = read(given.json)
        if any(row["cell"] == cell.name and row["verdict"] in FINE for row in content["rows"]):
            continue
        row = made(cell, given.work.absolute(), given.again)
        others = [old for old in content["rows"] if old["cell"] != cell.name]
        write(given.json, {"meta": {"common": COMMON, "versions": versions()}, "rows": [*others, row]})
        print(f"{cell.name}: {row['verdict']}, {row['seconds']:.0f} s", flush=True)
    mine = [next(row for row in read(given.json)["rows"] if row["cell"] == cell.name) for cell in cells]
    print(f"\n<!-- from: {given.json} -->\n{table(mine)}")
    return 0 if all(row["verdict"] in FINE for row in mine) else 1


if __name__ == "__main__":
    sys.exit(main())
