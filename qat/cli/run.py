"""qat run: full precision, every PTQ arm, QAT; export, verify, generate. Resumed by arm, by step and by block."""

import sys
from typing import Any

from rich.console import Console

from qat.cli import tracking
from qat.cli.arms import full_precision_arm, ptq_arm, qat_arm
from qat.cli.exporting import export, references, write_card
from qat.cli.meter import Meter
from qat.cli.serving import kernel_lines
from qat.cli.workbench import Workbench, linears, open_workbench
from qat.evaluation.recovered import recovered
from qat.numerics.kv import kind_of
from qat.report.tables import arms_table, export_lines, recovered_lines, warnings
from qat.surgery.convert import apply
from qat.training.loggers import wandb_logger

TRAINED = "qat"
WIDTH = 120  # of tables, where no terminal says


def main(config: dict[str, Any]) -> int:
    """`qat run`, and by their configs `qat train` and `qat ptq`: the same road with fewer arms."""
    bench = open_workbench(config)
    meter = Meter(bench.device)
    methods = dict(bench.config.get("arms") or {})
    if "method" in bench.config:
        methods[bench.config["choices"]["method"]] = bench.config["method"]
    trains = bench.config["verb"] != "ptq"
    _introduce(bench)
    if bench.config["dry_run"]:
        for name, method in methods.items():
            say(f"{name}: {_shown(method)}")
        if trains:
            say(_training(bench.config))
        bench.run.finish()  # a directory of its own: a dry run takes up no other
        return 0
    summary = bench.run.read("summary.json") or {"arms": {}}
    wandb_run = tracking.open_run(bench.config, bench.run.path, bench.run.path.name)
    try:
        _arms(bench, summary, methods, trains, wandb_run)
        _conclude(bench, summary, meter)
    finally:
        tracking.close(wandb_run, summary)
    bench.run.finish()
    return 1 if summary["export"]["verified"] is False else 0


def _arms(bench: Workbench, summary: dict[str, Any], methods: dict[str, Any], trains: bool, wandb_run: Any) -> None:
    arms = summary["arms"]
    if "fp" not in arms:
        say("fp: full precision")
        arms["fp"] = full_precision_arm(bench)
        bench.run.write("summary.json", summary)
    for name, method in methods.items():
        if name in arms and (trains or "export" in summary):
            continue
        say(f"{name}: {_shown(method)}")
        arms[name], changes = ptq_arm(bench, name, method, arms["fp"])
        bench.run.write("summary.json", summary)
        if not trains:
            graph = bench.moved(apply(bench.model, changes.tensors, changes.folded, recipe=bench.recipe))
            captured = "not applicable: a post-training method has no training graph"
            sequences = references(bench, graph)
            summary["export"] = export(bench, name, changes.tensors, changes.folded, sequences, captured)
    if trains and (TRAINED not in arms or "export" not in summary):
        say(_training(bench.config))
        loggers = [] if wandb_run is None else [wandb_logger(wandb_run)]
        arms[TRAINED], summary["export"], summary["cost"] = qat_arm(bench, arms["fp"], loggers)
    if TRAINED in arms:
        reference = "ft_fp" if bench.config["loss"]["ce"] else "fp"  # cross-entropy fits the text: fp is no limit
        if reference in arms:
            summary["recovered"] = recovered(arms, _ptq(methods), TRAINED, reference)
        elif methods:
            say("nothing is said of recovered losses: with cross-entropy they are judged against a fine-tuned model")
    bench.run.write("summary.json", summary)


def _training(config: dict[str, Any]) -> str:
    """The trained arm, in a line."""
    choices, trainer = config["choices"], config["trainer"]
    size = f"{trainer['batch_size'] * trainer['accumulate']} x {config['data']['seq_len']} tokens"
    words = [f"{trainer['max_steps']} steps of {size} on {choices['loss']}", f"from {choices['init']}"]
    words += [f"estimator {choices['estimator']}", f"schedule {choices['schedule']}"]
    words += [] if choices["adapter"] == "none" else [f"adapter {choices['adapter']}"]
    return f"{TRAINED}: {', '.join(words)}"


def _ptq(methods: dict[str, Any]) -> list[str]:
    """The arms that QAT is judged against: AutoRound too; other block-wise training, after a method as well, is QAT."""
    return [name for name, method in methods.items() if all(_is_ptq(step) for step in _chain(method))]


def _is_ptq(method: dict[str, Any]) -> bool:
    return method["_target_"].startswith("qat.ptq.") or bool(method.get("signed"))


def _chain(method: dict[str, Any]) -> list[dict[str, Any]]:
    """A method, the one that goes on after it, and so forth."""
    then = method.get("then")
    return [method, *(_chain(then) if then else [])]


def _introduce(bench: Workbench) -> None:
    what = "resumed" if bench.run.resumed else "new"
    say(f"run directory: {bench.run.path} ({what})")
    tokens = {split: len(stream) for split, stream in bench.tokens.streams.items()}
    seq_len, judged = bench.windows.shape[1], bench.windows.numel()
    calibrated = sum(batch.numel() for batch in bench.calibration)
    say(f"device {bench.run.facts['device']}, data {bench.tokens.path.name} {tokens}")
    say(f"calibration {calibrated} tokens, judged on {judged} test tokens in windows of {seq_len}\n")
    print(bench.plan, flush=True)
    stored = bench.config["export"]
    if stored["target"] is not None:
        for line in kernel_lines(
            stored["target"], bench.config["format"]["name"], linears(bench.plan, bench.config), stored["dtype"]
        ):
            say(line)
    if bench.recipe.kv is not None:
        say(f"keys and values: {kind_of(bench.recipe.kv)}, a scale for each token and head, in every arm but fp")


def _conclude(bench: Workbench, summary: dict[str, Any], meter: Meter) -> None:
    from qat.cli.continuations import continuations
    from qat.report.plots import draw

    console = Console(width=None if sys.stdout.isatty() else WIDTH)
    dtype = "fp32" if bench.device.type == "cpu" else "bf16"
    console.print(arms_table(summary["arms"], f"\n{bench.config['choices']['recipe']}, judged in {dtype}"))
    for line in [*recovered_lines(summary.get("recovered", {})), "", *export_lines(summary["export"])]:
        say(line)
    summary["warnings"] = warnings(summary)
    for line in summary["warnings"]:
        say(f"WARNING: {line}")
    exported = summary["export"]["path"] is not None
    if exported:
        say("\nThe packed model continues:")
        summary["continuations"] = continuations(summary["export"]["path"], bench.config)
        for prompt, text in summary["continuations"].items():
            say(f"  {prompt!r} -> {text!r}")
    spent = meter.read()
    summary["cost"] = summary.get("cost", {}) | {f"run_{key}": value for key, value in spent.items()}
    bench.run.write("summary.json", summary)
    arm = TRAINED if bench.config["verb"] != "ptq" else bench.config["choices"]["method"]
    write_card(bench, summary, arm, summary["export"])
    files = draw([bench.run.path], bench.run.path / "plots")
    for line in [f"plot: {file}" for file in files] or ["no plots: they need matplotlib (pip install 'qat[report]')"]:
        say(line)
    say(f"\n{spent['seconds']:.0f} s, {spent['cpu_seconds']:.0f} CPU s. Next:")
    served = ("qat chat run=latest", "qat serve run=latest", "qat verify run=latest")
    for command in (*(served if exported else ()), "qat compare latest"):
        say(f"  {command}")


def say(text: str) -> None:
    """One line to the user, at once."""
    print(text, flush=True)


def _shown(method: dict[str, Any]) -> str:
    """Its settings; what is nested by its name, such as an observer's or that of the method that goes on."""
    named = {k: v.get("_target_", "").rpartition(".")[2] if isinstance(v, dict) else v for k, v in method.items()}
    return ", ".join(f"{k}={v}" for k, v in named.items() if not k.startswith("_") and v is not None)
