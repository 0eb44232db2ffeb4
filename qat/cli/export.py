"""qat export: an arm of a run as a checkpoint with a certificate, or a checkpoint in another format.

Both come from what is there: nothing is searched again, and no scale or code is evaluated again.
"""

import sys
from pathlib import Path
from typing import Any

import yaml

from qat.cli.arms import quantize, static_inputs, train
from qat.cli.converting import convert
from qat.cli.exporting import export, outcome, references, write_card
from qat.cli.rules import reordered
from qat.cli.rundir import RunDir, find, is_finished
from qat.cli.workbench import open_workbench, pick_device, quiet
from qat.report.tables import export_lines
from qat.surgery.convert import apply


def main(config: dict[str, Any]) -> int:
    """Exit 0 only if the export is verified."""
    return _converted(config) if config["from"] else _exported(config)


def _converted(config: dict[str, Any]) -> int:
    quiet()
    source, name = Path(config["from"]).expanduser(), config["format"]["name"]
    out = Path(config["out"]).expanduser() if config["out"] else source.parent / name
    certificate = convert(source, name, out, str(pick_device("auto")), config["export"]["target"])
    return _told(out, outcome(str(out), certificate), certificate["unchecked"])


def _exported(config: dict[str, Any]) -> int:
    path = find(config["runs"], config["run"], lambda path: is_finished(path, "run", "train", "ptq"))
    settings = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8")) | {"format": config["format"]}
    settings["export"] = settings["export"] | config["export"]
    methods = dict(settings.get("arms") or {})
    if "method" in settings:
        methods[settings["choices"]["method"]] = settings["method"]
    arm = config["arm"] or ("qat" if settings["verb"] != "ptq" else settings["choices"]["method"])
    if arm != "qat" and arm not in methods:
        raise ValueError(f"arm={arm}: the run has {', '.join(['qat', *methods])}")
    if arm == "qat" and not list(path.glob("checkpoints/step=*.ckpt")):
        raise ValueError(f"arm=qat: {path} has no training checkpoint; its arms are {', '.join(methods) or 'none'}")
    if config["format"]["name"] == "none":
        raise ValueError("format=none: there is nothing to write; name a format")
    settings["method"] = methods.get(arm)
    for problem in reordered({"method": settings["method"], "format": settings["format"]}, None):
        raise ValueError(f"arm={arm}: {problem.text}")
    bench = open_workbench(settings, RunDir.existing(path))
    captured: Any
    if arm == "qat":
        tensors, folded, sequences, captured, _ = train(bench, [])
    else:
        changes = quantize(bench, arm, methods[arm])
        tensors, folded = changes.tensors, changes.folded | static_inputs(bench, changes)
        sequences = references(bench, bench.moved(apply(bench.model, tensors, folded, recipe=bench.recipe)))
        captured = "not applicable: a post-training method has no training graph"
    out = Path(config["out"]).expanduser() if config["out"] else path / "export" / f"{arm}-{config['format']['name']}"
    found = export(bench, arm, tensors, folded, sequences, captured, out)
    write_card(bench, bench.run.read("summary.json"), arm, found, sys.argv)
    return _told(out, found, [])


def _told(out: Path, outcome: dict[str, Any], unchecked: list[str]) -> int:
    print(out)
    for line in [*export_lines(outcome), *unchecked]:
        print(line)
    print(f"Next:\n  qat chat {out}\n  qat serve {out}")
    return 0 if outcome["verified"] else 1
