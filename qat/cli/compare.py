"""qat compare RUN... [--json] [--md]: runs side by side, from their directories alone."""

import argparse
import json
import os
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

from qat.cli.errors import require
from qat.cli.rundir import find
from qat.report.compare import as_markdown, compare
from qat.report.plots import draw
from qat.report.runs import read


def main(argv: list[str]) -> int:
    """Prints the comparison; with several runs and `--plots DIR`, draws them into one figure."""
    parser = argparse.ArgumentParser(prog="qat compare", description="Run directories side by side.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run directory, or `latest`, the newest with a result")
    parser.add_argument("--json", action="store_true", help="as one JSON object")
    parser.add_argument("--md", action="store_true", help="as Markdown")
    parser.add_argument("--plots", metavar="DIR", help="draw perplexity and KL against size into DIR")
    arguments = parser.parse_args(argv)
    root = os.environ.get("QAT_RUNS", "runs")
    named = [path.removeprefix("run=") for path in arguments.runs]  # as the other verbs have it
    runs = [read(str(find(root, path, lambda run: (run / "summary.json").is_file()))) for path in named]
    comparison = compare(runs)
    if arguments.json:
        print(json.dumps(comparison, indent=1))
    elif arguments.md:
        print(as_markdown(comparison))
    else:
        Console().print(Markdown(as_markdown(comparison)))
    if arguments.plots:
        require("matplotlib", extra="report")
        for file in draw([run.path for run in runs], Path(arguments.plots)):
            print(f"plot: {file}")
    return 0
