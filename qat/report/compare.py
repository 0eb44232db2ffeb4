"""Runs side by side: arms with deltas, the config keys in which runs differ, and every reason for doubt."""

from typing import Any

from qat.report.runs import Run, differing, incomparable
from qat.report.tables import markdown

METRICS = ("ppl", "nll", "nll_se", "kl", "top1_agree", "bits_per_quantized_weight", "bytes", "seconds")


def compare(runs: list[Run]) -> dict[str, Any]:
    """Everything that the comparison says, as plain data: what `--json` prints.

    Deltas are taken against the same arm of the first run; a run's own `fp` is the reference of its `kl` and `nll_se`.
    """
    first = runs[0]
    rows = []
    for run in runs:
        for name, arm in run.arms.items():
            row = {"run": run.name, "arm": name} | {metric: arm.get(metric) for metric in METRICS}
            base = first.arms.get(name)
            if run is not first and base:
                row["delta"] = {m: arm[m] - base[m] for m in ("ppl", "nll", "kl", "top1_agree")}
            rows.append(row)
    return {
        "runs": [run.name for run in runs],
        "warnings": incomparable(runs),
        "rows": rows,
        "recovered": {run.name: run.summary.get("recovered", {}) for run in runs},
        "differing": differing(runs),
    }


def as_markdown(comparison: dict[str, Any]) -> str:
    """The same as Markdown."""
    several = len(comparison["runs"]) > 1
    header = ["run", "arm", "ppl", "KL", "top-1", "bits/quantized weight", "MB", "seconds"] + [
        "Δ ppl",
        "Δ KL",
    ] * several
    rows = []
    for row in comparison["rows"]:
        cells = [row["run"], row["arm"], f"{row['ppl']:.3f}", f"{row['kl']:.4f}", f"{row['top1_agree']:.3f}"]
        cells += [f"{row['bits_per_quantized_weight']:.2f}", f"{row['bytes'] / 1e6:.1f}", f"{row['seconds']:.0f}"]
        if several:
            delta = row.get("delta")
            cells += [f"{delta['ppl']:+.3f}", f"{delta['kl']:+.4f}"] if delta else ["", ""]
        rows.append(cells)
    parts = [f"**WARNING**: {reason}" for reason in comparison["warnings"]]
    parts.append(markdown(header, rows))
    keys = comparison["differing"]
    if several:
        table = markdown(["config key", *comparison["runs"]], [[k, *map(str, v)] for k, v in keys.items()])
        parts.append(table if keys else "The runs have the same configuration.")
    return "\n\n".join(parts)
