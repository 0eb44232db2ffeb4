"""qat sensitivity: what each unit loses at each width, a recipe of mixed widths for a budget, and whether it helps."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from hydra.utils import instantiate
from rich.console import Console

from qat.cli import tracking
from qat.cli.arms import full_precision_arm, ptq_arm
from qat.cli.fields import at
from qat.cli.meter import Meter
from qat.cli.mixed import dump, mixed_recipe
from qat.cli.run import WIDTH, say
from qat.cli.rundir import find, is_finished
from qat.cli.workbench import Workbench, open_workbench
from qat.evaluation.divergence import mean, standard_error
from qat.evaluation.sensitivity import Replay, Unit, divided, measure, units
from qat.models.families import structure_of
from qat.models.structure import Structure
from qat.numerics.allocate import allocate, at_width, budget_bits, monotone, stored_bits
from qat.report import plots
from qat.report.sensitivity import allocation_lines, draw, recipes_table, sensitivity_table
from qat.surgery.match import match

MIXED = "mixed"  # the arm
MEASURING = ("recipe", "observer", "calibration", "export.dtype", "bits", "unit")  # keys that decide what is measured
SAID_EVERY = 10.0  # seconds
State = dict[str, Any]


def main(config: dict[str, Any]) -> int:
    """Measures, allocates, writes `recipe.yaml`, and judges it beside one width for all."""
    source = _source(config)  # before `latest` is this run, and before anything is loaded
    bench = open_workbench(config, split="validation")
    structure = structure_of(bench.model.config.model_type)
    found = units(list(bench.plan.quantized), structure, bench.config["unit"])
    budget = _budget(bench)
    meter = Meter(bench.device)
    say(f"run directory: {bench.run.path} ({'resumed' if bench.run.resumed else 'new'})")
    tokens = sum(batch.numel() for batch in bench.calibration)
    say(f"device {bench.run.facts['device']}, {len(found)} units x {len(_widths(bench))} widths on {tokens} tokens\n")
    print(bench.plan, flush=True)
    if bench.config["dry_run"]:
        bench.run.finish()
        return 0
    state = bench.run.read("sensitivity.json") or {"units": _taken_over(bench, source) if source else {}}
    summary = bench.run.read("summary.json") or {"arms": {}}
    wandb_run = tracking.open_run(bench.config, bench.run.path, bench.run.path.name)
    try:
        _measure(bench, found, structure, state)
        node = _allocate(bench, found, structure, state, budget)
        _judge(bench, structure, node, state, summary)
        _conclude(bench, state, summary, meter)
    finally:
        tracking.close(wandb_run, summary)
    bench.run.finish()
    return 0


def _widths(bench: Workbench) -> list[int]:
    return sorted(bench.config["bits"])


def _budget(bench: Workbench) -> int:
    weights = [(row.weight, row.shape) for row in bench.plan.rows if row.weight is not None]
    try:
        return budget_bits(bench.config["budget"], weights, _widths(bench), bench.dtype.itemsize * 8)
    except ValueError as error:
        raise ValueError(f"budget: {error}") from None


def _source(config: dict[str, Any]) -> Path | None:
    """The run that measured, if one is named.

    Raises:
        ValueError: It is no finished run of this verb.
    """
    if not config["measured"]:
        return None
    source = find(config["runs"], config["measured"], lambda path: is_finished(path, "sensitivity"))
    if not is_finished(source, "sensitivity"):
        raise ValueError(f"measured={source}: no finished run of qat sensitivity")
    return source


def _taken_over(bench: Workbench, source: Path) -> State:
    """The units of another run.

    Raises:
        ValueError: It measured something else.
    """
    known = yaml.safe_load((source / "config.yaml").read_text(encoding="utf-8"))
    facts = json.loads((source / "run.json").read_text(encoding="utf-8"))
    other = [key for key in MEASURING if at(known, key) != at(bench.config, key)]
    other += [key for key in ("model", "data") if facts[key]["fingerprint"] != bench.run.facts[key]["fingerprint"]]
    if other:
        raise ValueError(f"measured={source}: it measured with another {other[0]}; measure again with measured=null")
    return json.loads((source / "sensitivity.json").read_text(encoding="utf-8"))["units"]


def _measure(bench: Workbench, found: list[Unit], structure: Structure, state: State) -> None:
    """Fills `state["units"]`, which is kept after each measurement."""
    table = state["units"]
    wanted = [(unit, bits) for unit in found for bits in _widths(bench)]
    todo = [(unit, bits) for unit, bits in wanted if str(bits) not in table.get(unit.name, {}).get("widths", {})]
    if not todo:
        return
    replay = Replay(bench.judged, structure.blocks, bench.calibration)
    observer, begun, said = bench.build("observer"), time.monotonic(), time.monotonic()
    shapes = {row.name: row.shape for row in bench.plan.rows}
    for done, (unit, bits) in enumerate(todo, 1):
        schemes = {name: at_width(bench.plan.quantized[name], bits) for name in unit.modules}
        windows = measure(replay, unit, schemes, observer, bench.dtype)
        size = sum(stored_bits(scheme, shapes[name], bench.dtype.itemsize * 8) for name, scheme in schemes.items())
        cell: State = {"bits": size}
        for metric, values in windows.items():
            each = torch.tensor(values, dtype=torch.float64)
            cell |= {metric: mean(each, 1), f"{metric}_se": standard_error(each, 1)}
        weights = sum(shapes[name][0] * shapes[name][1] for name in unit.modules)
        row = table.setdefault(unit.name, {"modules": list(unit.modules), "weights": weights, "widths": {}})
        row["widths"][str(bits)] = cell | {"windows": windows}
        bench.run.write("sensitivity.json", state)
        if done == len(todo) or time.monotonic() - said > SAID_EVERY:
            said = time.monotonic()
            say(f"  {len(wanted) - len(todo) + done}/{len(wanted)} measured, {said - begun:.0f} s")


def _allocate(bench: Workbench, found: list[Unit], structure: Structure, state: State, budget: int) -> State:
    """Chooses a width for each unit, writes `recipe.yaml` and returns its content."""
    widths, metric, table = _widths(bench), bench.config["metric"], state["units"]
    for unit in found:
        cells = [table[unit.name]["widths"][str(bits)] for bits in widths]
        for cell, loss in zip(cells, monotone([cell[metric] for cell in cells]), strict=True):
            cell["loss"] = loss
    options = [[(cell["bits"], cell["loss"]) for cell in table[unit.name]["widths"].values()] for unit in found]
    chosen = allocate(options, budget)
    for unit, choice in zip(found, chosen.choices, strict=True):
        table[unit.name]["chosen"] = widths[choice]
    modules = {name: table[unit.name]["chosen"] for unit in found for name in unit.modules}
    smoothed = [u.name for u in found if any(c["loss"] != c[metric] for c in table[u.name]["widths"].values())]
    state["allocation"] = {
        "budget": bench.config["budget"],
        "metric": metric,
        "bits_per_quantized_weight": chosen.bits / sum(row["weights"] for row in table.values()),
        "loss": chosen.loss,
        "bound": chosen.bound,
        "smoothed": smoothed,
        "divided": divided(modules, structure),
    }
    node = mixed_recipe(bench.config["recipe"], structure.blocks, modules, {r.name: r.rule for r in bench.plan.rows})
    plan = match(bench.model, instantiate(node, _convert_="all"))
    assert {n: s.grid.bits for n, s in plan.quantized.items()} == modules, "the rules do not say what was chosen"
    bits = f"{state['allocation']['bits_per_quantized_weight']:.4f}"
    comment = f"Mixed widths, {bits} bits per quantized weight: written by qat sensitivity."
    (bench.run.path / "recipe.yaml").write_text(dump(node, comment), encoding="utf-8")
    bench.run.write("sensitivity.json", state)
    return node


def _judge(bench: Workbench, structure: Structure, node: State, state: State, summary: State) -> None:
    """Whole recipes, round to nearest on the same ranges: one width for all, and the mixture."""
    arms = summary["arms"]
    if "fp" not in arms:
        arms["fp"] = full_precision_arm(bench)
    rules = {row.name: row.rule for row in bench.plan.rows}
    nodes = {}
    for bits in _widths(bench):
        widths = dict.fromkeys(bench.plan.quantized, bits)
        nodes[f"w{bits}"] = mixed_recipe(bench.config["recipe"], structure.blocks, widths, rules)
    method = {"_target_": "qat.ptq.rtn.rtn", "_partial_": True, "observer": bench.config["observer"]}
    for name, content in (nodes | {MIXED: node}).items():
        if name not in arms:
            recipe = instantiate(content, _convert_="all")
            other = replace(bench, recipe=recipe, plan=match(bench.model, recipe))
            vars(other)["judged"] = bench.judged  # the same model: no second copy of it on a GPU
            arms[name], _ = ptq_arm(other, name, method, arms["fp"])
            bench.run.write("summary.json", summary)
    size = "bits_per_quantized_weight"
    rivals = [name for name in nodes if arms[name][size] <= arms[MIXED][size] + 1e-9]
    rival = max(rivals, key=lambda name: arms[name][size])
    ours, theirs = (torch.tensor(arms[name]["windows"]["kl"], dtype=torch.float64) for name in (MIXED, rival))
    tokens = arms[MIXED]["tokens"] // len(ours)
    difference, noise = mean(theirs - ours, tokens), standard_error(theirs, tokens, ours)
    state["versus"] = {"arm": rival, size: arms[rival][size], "windows": len(ours)}
    state["versus"] |= {"kl_saved": difference, "kl_saved_se": noise}
    bench.run.write("sensitivity.json", state)


def _conclude(bench: Workbench, state: State, summary: State, meter: Meter) -> None:
    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    console.print(sensitivity_table(state, bench.config["metric"]))
    dtype = "fp32" if bench.device.type == "cpu" else "bf16"
    title = f"\nwhole recipes, round to nearest on the same ranges, on the validation split in {dtype}"
    console.print(recipes_table(summary["arms"], title))
    for line in allocation_lines(state, summary["arms"][MIXED]["kl"]):
        say(line)
    spent = meter.read()
    summary["cost"] = {f"run_{key}": value for key, value in spent.items()}
    bench.run.write("summary.json", summary)
    directory = bench.run.path / "plots"
    files = [*draw(state, directory), *plots.draw([bench.run.path], directory)]
    for line in [f"plot: {file}" for file in files] or ["no plots: they need matplotlib (pip install 'qat[report]')"]:
        say(line)
    say(f"\n{spent['seconds']:.0f} s, {spent['cpu_seconds']:.0f} CPU s. Next:")
    say(f"  qat run recipe={bench.run.path / 'recipe.yaml'}")
    say("  qat sensitivity measured=latest budget=...")
