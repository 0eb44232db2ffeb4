"""Arms of finished runs as rows of a results file, and as the README's tables.

    python scripts/results_table.py runs/quickstart/... [more runs] --json scripts/results/quickstart.json

A run is its directory; of it only config.yaml, run.json and summary.json are read.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml

KEPT = ("ppl", "nll", "nll_se", "tokens", "kl", "top1_agree", "bits_per_weight", "bits_per_quantized_weight", "bytes",
        "seconds", "cpu_seconds", "peak_mem_mb", "seed")  # fmt: skip
COLUMNS = {  # in the table: key in the row, format
    "ppl": ("ppl", ".3f"),
    "KL": ("kl", ".4f"),
    "top-1": ("top1_agree", ".3f"),
    "bits": ("bits_per_quantized_weight", ".2f"),
    "seconds": ("seconds", ".0f"),
    "peak MB": ("peak_mem_mb", "d"),
}


def read(run: Path) -> dict[str, Any]:
    """One run: what it was, its arms, what QAT recovered, its export and its cost; refused if it has not ended."""
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    facts, summary = (json.loads((run / name).read_text(encoding="utf-8")) for name in ("run.json", "summary.json"))
    if "export" not in summary:
        raise SystemExit(f"{run}: has not ended; `qat run` with the same arguments goes on with it")
    recipe, device = config["choices"]["recipe"], facts["device"]
    named = {"run": f"{recipe} on {device}", "recipe": recipe, "device": device}
    export = {key: value for key, value in summary["export"].items() if key != "path"}
    return {
        "meta": {
            **named,
            "commit": (facts["git"] or {}).get("sha"),
            "dirty": (facts["git"] or {}).get("dirty"),
            "versions": facts["versions"],
            "date": facts["started"],
            "threads": facts["threads"],
            "data": facts["data"]["fingerprint"],
            "cost": summary["cost"],
            "recovered": summary.get("recovered", {}),
            "export": export,
        },
        "rows": [{**named, "arm": arm, **{k: values[k] for k in KEPT}} for arm, values in summary["arms"].items()],
    }


def headline(run: dict[str, Any]) -> str:
    """What ran, where, at what cost, and what came of it."""
    meta, export, size = run["meta"], run["meta"]["export"], {row["arm"]: row["bytes"] / 1e6 for row in run["rows"]}
    cost, changes = meta["cost"], ", with changes" if meta.get("dirty") else ""
    wall = f", the command {cost['wall_seconds']:.0f} s by the wall" if "wall_seconds" in cost else ""
    return (
        f"{meta['run']}, commit {str(meta['commit'])[:9]}{changes}, {meta['date'][:10]}: the run took "
        f"{cost['run_seconds']:.0f} s and {cost['run_cpu_seconds']:.0f} CPU s{wall}; {cost['run_peak_mem_mb']} MB at "
        f"its peak. {size['qat']:.1f} MB instead of {size['fp']:.1f}, "
        f"{'verified' if export['verified'] else 'NOT verified'}."
    )


def table(run: dict[str, Any]) -> str:
    """The arms of a run as Markdown."""
    rows = [["arm", *COLUMNS], ["---"] * (1 + len(COLUMNS))]
    rows += [[row["arm"], *(format(row[key], how) for key, how in COLUMNS.values())] for row in run["rows"]]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows)


def recovered(run: dict[str, Any]) -> str:
    """How much of what the best PTQ arm loses QAT does not."""
    best = run["meta"]["recovered"].get("vs_best_ptq", {})
    known = {key: best[key] for key in ("kl", "nll") if best.get(key, {}).get("value") is not None}
    parts = [f"{100 * one['value']:.1f} % of the {key} of {one['winner']}" for key, one in known.items()]
    return f"Recovered against the best PTQ: {', '.join(parts) or 'nothing is known'}."


def main() -> int:
    """Prints the tables; writes the file where one is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--commit", help="of the files that ran, where the run could not know it")
    parser.add_argument("--wall", type=float, help="seconds of the command as a whole, where it was timed")
    args = parser.parse_args()
    runs = [read(run) for run in args.runs]
    for run in runs:
        if args.commit:
            run["meta"] |= {"commit": args.commit, "dirty": False}
        if args.wall is not None:
            run["meta"]["cost"]["wall_seconds"] = args.wall
        print(headline(run), table(run), recovered(run), sep="\n\n", end="\n\n")
    if args.json:
        content = {
            "meta": {"argv": sys.argv, "runs": [r["meta"] for r in runs]},
            "rows": [x for r in runs for x in r["rows"]],
        }
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
