"""Perplexity and KL against size, as PNG. matplotlib comes with the extra `report`; without it there is no plot."""

import importlib.util
from pathlib import Path

from qat.report.runs import Run, read

MARKS = {"fp": "s", "qat": "*"}


def draw(paths: list[Path], directory: Path) -> list[Path]:
    """Draws the plots of some runs into a directory and returns the files; none if matplotlib is not installed."""
    if importlib.util.find_spec("matplotlib") is None:
        return []
    directory.mkdir(parents=True, exist_ok=True)
    runs = [read(path) for path in paths]
    return [_pareto(runs, metric, label, directory) for metric, label in (("ppl", "perplexity"), ("kl", "KL, nats"))]


def _pareto(runs: list[Run], metric: str, label: str, directory: Path) -> Path:
    from matplotlib.figure import Figure  # no pyplot: no global state, no display
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(7, 4.5))
    axes = figure.add_axes((0.11, 0.11, 0.86, 0.86))
    for i, run in enumerate(runs):
        for name, arm in run.arms.items():
            if metric == "kl" and name == "fp":
                continue
            size = arm["bytes"] / 1e6
            axes.plot(size, arm[metric], MARKS.get(name, "o"), color=f"C{i}", markersize=10 if name == "qat" else 7)
            where = (6, 4)
            axes.annotate(name, (size, arm[metric]), where, textcoords="offset points", fontsize=9)
        axes.plot([], [], "o", color=f"C{i}", label=run.name)
    axes.margins(0.1)  # room for the names
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")  # "20", not a power of ten
    axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel("safetensors, MB")
    axes.set_ylabel(f"{label} on the test windows")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    file = directory / f"{metric}_vs_size.png"
    figure.savefig(file, dpi=120)
    return file
