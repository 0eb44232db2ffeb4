"""What was measured of each unit, what was chosen, and whether it helped; from `sensitivity.json` alone."""

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

SHOWN = 20  # rows of the table
SIGNIFICANT = 3.0  # standard errors
RECIPES = ("recipe", "bits/quantized weight", "MB", "ppl", "nll", "KL", "top-1")


def ranked(state: Mapping[str, Any]) -> list[str]:
    """Units, the one that loses most at the smallest width first."""
    units = state["units"]
    return sorted(units, key=lambda name: -next(iter(units[name]["widths"].values()))["loss"])


def sensitivity_table(state: Mapping[str, Any], metric: str) -> Table:
    """The most sensitive units, for a terminal: loss and standard error at every width, and the width chosen."""
    units = state["units"]
    widths = list(next(iter(units.values()))["widths"])
    what = {"kl": "KL to full precision", "nll": "rise of nll"}[metric]
    title = f"\n{what}, nats per token, where one unit is quantized alone (most sensitive first)"
    table = Table(title=title, title_justify="left")
    table.add_column("unit", overflow="fold")
    for column in (*(f"{bits} bits" for bits in widths), "chosen"):
        table.add_column(column, justify="right", no_wrap=True)
    for name in ranked(state)[:SHOWN]:
        row = units[name]
        cells = [f"{cell[metric]:.1e} ± {cell[f'{metric}_se']:.0e}" for cell in row["widths"].values()]
        table.add_row(name, *cells, str(row["chosen"]))
    if len(units) > SHOWN:
        table.caption = f"{len(units) - SHOWN} more in sensitivity.json"
        table.caption_justify = "left"
    return table


def recipes_table(arms: Mapping[str, Mapping[str, Any]], title: str) -> Table:
    """Whole recipes by size, for a terminal."""
    table = Table(title=title, title_justify="left")
    for column in RECIPES:
        table.add_column(column, justify="left" if column == "recipe" else "right", no_wrap=True)
    for name, arm in sorted(arms.items(), key=lambda item: item[1]["bits_per_quantized_weight"]):
        bits, size = f"{arm['bits_per_quantized_weight']:.4f}", f"{arm['bytes'] / 1e6:.1f}"
        quality = (f"{arm['ppl']:.3f}", f"{arm['nll']:.4f}", f"{arm['kl']:.4f}", f"{arm['top1_agree']:.3f}")
        table.add_row(name, bits, size, *quality)
    return table


def allocation_lines(state: Mapping[str, Any], measured: float) -> list[str]:
    """What was chosen and how good it is, in sentences.

    Args:
        state: The content of `sensitivity.json`.
        measured: KL of the whole recipe.
    """
    chosen, versus = state["allocation"], state["versus"]
    counts: dict[int, int] = {}
    for row in state["units"].values():
        counts[row["chosen"]] = counts.get(row["chosen"], 0) + len(row["modules"])
    widths = ", ".join(f"{counts[bits]} at {bits} bits" for bits in sorted(counts))
    gap, size = chosen["loss"] - chosen["bound"], chosen["bits_per_quantized_weight"]
    lines = [
        f"modules: {widths}; {size:.4f} bits per quantized weight of {chosen['budget']:g}",
        f"sum of the units' losses {chosen['loss']:.4g}, the least there is (the Lagrangian bound is {gap:.1e} below); "
        f"KL of the whole recipe {measured:.4g}: losses do not add up exactly",
    ]
    if smoothed := chosen["smoothed"]:
        lines.append(
            f"{len(smoothed)} of {len(state['units'])} units lost less at a smaller width, or less than nothing: "
            f"noise, which was averaged out (isotonic regression, never negative)"
        )
    if divided := chosen["divided"]:
        lines.append(
            f"NOTE: {len(divided)} groups of linears that share their input have several widths, first {divided[0]}; "
            f"engines that fuse them (vLLM, SGLang) need one: unit=stage"
        )
    if len(counts) == 1:
        return [*lines, "no mixture within the budget is expected to lose less than one width for all"]
    saved, noise = versus["kl_saved"], versus["kl_saved_se"]
    where = "below" if saved > 0 else "above"
    rival = f"{versus['arm']}'s, the largest single width that fits ({versus['bits_per_quantized_weight']:.4f} bits)"
    if versus["windows"] == 1:
        return [*lines, f"one window has no standard error; there the KL is {abs(saved):.4f} nats {where} {rival}"]
    helps = "helps" if saved > SIGNIFICANT * noise else "does NOT help beyond noise"
    return [*lines, f"the mixture {helps}: its KL is {abs(saved):.4f} ± {noise:.4f} nats {where} {rival}"]


def draw(state: Mapping[str, Any], directory: Path) -> list[Path]:
    """Draws every unit's loss at every width, the chosen ones ringed; nothing if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    directory.mkdir(parents=True, exist_ok=True)
    units = state["units"]
    figure = Figure(figsize=(11, 5), layout="constrained")
    axes = figure.add_subplot()
    losses = {
        bits: [row["widths"][bits]["loss"] for row in units.values()] for bits in next(iter(units.values()))["widths"]
    }
    for i, (bits, values) in enumerate(losses.items()):
        axes.plot(range(len(units)), values, "o", color=f"C{i}", markersize=4, label=f"{bits} bits")
    chosen = [row["widths"][str(row["chosen"])]["loss"] for row in units.values()]
    axes.plot(range(len(units)), chosen, "o", color="black", fillstyle="none", markersize=8, label="chosen")
    least = min((value for values in losses.values() for value in values if value > 0), default=1.0)
    axes.set_yscale("symlog", linthresh=least)  # logarithmic, and 0 has a place
    step = max(len(units) // 30, 1)
    axes.set_xticks(range(0, len(units), step), list(units)[::step], rotation=90, fontsize=6)
    axes.set_ylabel(f"{state['allocation']['metric']}, nats per token, one unit at a time")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    file = directory / "sensitivity.png"
    figure.savefig(file, dpi=120)
    return [file]
