"""Tables and sentences about a run, from its `summary.json` alone."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

COLUMNS = ("arm", "ppl", "KL", "top-1", "bits/weight", "MB", "seconds", "CPU s", "peak MB")


def arm_rows(arms: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """One row for each arm, as text, in the order of `COLUMNS`; a mark says that a method fell back somewhere."""
    return [
        [
            name + ("*" if arm["fallbacks"] else ""),
            f"{arm['ppl']:.3f}",
            f"{arm['kl']:.4f}",
            f"{arm['top1_agree']:.3f}",
            f"{arm['bits_per_weight']:.2f}",
            f"{arm['bytes'] / 1e6:.1f}",
            f"{arm['seconds']:.0f}",
            f"{arm['cpu_seconds']:.0f}",
            f"{arm['peak_mem_mb']}",
        ]
        for name, arm in arms.items()
    ]


def arms_table(arms: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """The arms side by side, for a terminal."""
    table = Table(title=title, title_justify="left")
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == "arm" else "right", no_wrap=True)
    for row in arm_rows(arms):
        table.add_row(*row)
    return table


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def recovered_lines(recovered: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What QAT won back, a line for each PTQ arm and one for the best."""
    lines = []
    for versus, values in recovered.items():
        if versus == "vs_best_ptq":
            parts = [
                f"{metric} {_percent(values[metric]['value'])} ({values[metric]['winner']})" for metric in ("kl", "nll")
            ]
            lines.append(f"recovered against the best PTQ: {', '.join(parts)}")
        else:
            name = versus.removeprefix("vs_")
            lines.append(f"recovered against {name}: kl {_percent(values['kl'])}, nll {_percent(values['nll'])}")
    return lines


def export_lines(export: Mapping[str, Any]) -> list[str]:
    """The certificate in a few lines."""

    def mark(value: bool | None) -> str:
        return {True: "yes", False: "NO", None: "not checked"}[value]

    if export["path"] is None:
        captured = export.get("captured")
        known = f"weights {captured}" if isinstance(captured, str) else "the codes are those that training saw"
        return [f"not exported (format=none), so nothing is proved of a file; {known}"]
    lines = [
        f"train == serve: {'VERIFIED' if export['verified'] else 'NOT VERIFIED'}",
        f"  codes, scales and other tensors are those that were found: {mark(export['codes_equal'])}",
        f"  other loaders decode the same weights, difference 0: {mark(export['weights_equal'])}",
        f"  engine, reference path: largest logit difference {_number(export['max_abs_logit_diff'])}, "
        f"KL of a token {_number(export['max_kl'])}, greedy tokens equal: {mark(export['greedy_equal'])}",
    ]
    if changed := export["files_changed"]:
        lines.insert(2, f"  config, tokenizer and other files are those that were written: NO ({', '.join(changed)})")
    if fast := export["fast_path"]:
        lines.append(
            f"  engine, fast path: KL {fast['kl']:.2e}, top-1 agreement {fast['top1_agree']:.4f}, "
            f"flips {len(fast['flips'])} (all near ties: {mark(fast['passed'])})"
        )
    return lines


def warnings(summary: Mapping[str, Any], trained: str = "qat") -> list[str]:
    """What a reader of the table must know."""
    arms, found = summary["arms"], []
    if trained in arms and arms[trained]["ppl"] < arms["fp"]["ppl"]:
        found.append(
            f"{trained}'s perplexity is below full precision's: training fitted this text. Judge it by KL, which "
            f"fitting cannot lower"
        )
    for name, arm in arms.items():
        if count := len(arm["fallbacks"]):
            found.append(
                f"{name} fell back to round-to-nearest in {count} modules, first {arm['fallbacks'][0]} (marked *)"
            )
    if (export := summary.get("export")) and export["verified"] is False:
        found.append("the export is not verified: see verify.json beside it")
    if export and export.get("fast_path") and not export["fast_path"]["passed"]:
        found.append("the engine's fast path is beyond its bound: serve with engine.kernel=reference")
    return found


def _percent(value: float | None) -> str:
    return "n/a (the loss is within noise)" if value is None else f"{100 * value:.1f} %"


def _number(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2e}"
