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
    """One run: what it was, its arms, what QAT recovered, its export and its cost."""
    config = yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))
    facts, summary = (json.loads((run / name).read_text(encoding="utf-8")) for name in ("run.json", "summary.json"))
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


def table(run: dict[str, Any]) -> str:
    """The arms of a run as Markdown."""
    best, rows = run["meta"]["recovered"].get("vs_best_ptq", {}), [["arm", *COLUMNS]]
    rows += [["---"] * len(rows[0])]
    rows += [[row["arm"], *(format(row[key], how) for key, how in COLUMNS.values())] for row in run["rows"]]
    known = [k for k in ("kl", "nll") if best.get(k, {}).get("value") is not None]
    recovered = ", ".join(f"{k} {best[k]['value']:.3f} ({best[k]['winner']})" for k in known) or "nothing is known"
    cost, changes = run["meta"]["cost"], ", with changes" if run["meta"].get("dirty") else ""
    return "\n".join([
        f"{run['meta']['run']}, commit {str(run['meta']['commit'])[:9]}{changes}, {run['meta']['date'][:10]}",
        "",
        *("| " + " | ".join(cells) + " |" for cells in rows),
        "",
        f"recovered against the best PTQ: {recovered}; verified: {run['meta']['export']['verified']}; "
        f"{cost['run_seconds']:.0f} s, {cost['run_cpu_seconds']:.0f} CPU s, peak {cost['run_peak_mem_mb']} MB",
        "",
    ])  # fmt: skip


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
        print(table(run))
    if args.json:
        content = {
            "meta": {"argv": sys.argv, "runs": [r["meta"] for r in runs]},
            "rows": [x for r in runs for x in r["rows"]],
        }
        args.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
