"""Ours against peers: the same model, grid, calibration tokens and test tokens, and one judge.

    python scripts/reproduce/ptq_peers.py --json scripts/results/ptq_peers.json --tokens DIR --venvs DIR
        [--tools qat llmcompressor ...] [--methods rtn gptq ...] [--bits 4 3 2] [--samples 16] [--steps 200]

Every tool quantizes all linears but the head, in symmetric groups of 64, by a driver of its own in `peers/`, which runs
in the tool's virtual environment VENVS/<tool> and leaves dense weights; `qat` runs in this one. What a driver made
waits in `--work` until it is judged. Rows that the JSON holds are not run again; a row that fails is left out, said,
and the exit status is 1. `seconds` are those of a machine that may have had other work; `cpu_seconds` are not.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from results import Row, read, write
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from qat.cli.rundir import git, versions
from qat.cli.workbench import device_name
from qat.data.calibration import calibration
from qat.data.text import load
from qat.evaluation.divergence import evaluate, mean, standard_error
from qat.models import hf
from qat.surgery.convert import apply

HERE = Path(__file__).parent
TOOLS = {
    "qat": (
        *("rtn", "mse_rtn", "gptq_paper", "gptq", "awq", "autoround"),
        *("rtn_ct", "gptq_paper_ct", "gptq_ct", "gptq_group_ct", "awq_ct"),  # with scales like those of the others
    ),
    "llmcompressor": ("rtn", "gptq", "gptq_mse", "awq"),
    "autoround": ("autoround",),
    "gptqmodel": ("gptq",),
}
OURS = {
    "rtn": ("rtn", "rtn_ct"),
    "gptq": ("gptq_paper", "gptq", "gptq_paper_ct", "gptq_ct", "gptq_group_ct"),
    "gptq_mse": ("gptq", "gptq_ct", "gptq_group_ct"),
    "awq": ("awq", "awq_ct"),
    "autoround": ("autoround",),
}
GROUP = 64


class Cell(NamedTuple):
    """One row of the table."""

    tool: str
    method: str
    bits: int

    @property
    def recipe(self) -> str:
        """Its recipe's name."""
        return f"w{self.bits}a16_g{GROUP}"

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells its row from others."""
        return self.tool, self.method, self.recipe

    def __str__(self) -> str:
        return f"{self.tool}.{self.method}.{self.recipe}"


def cells(tools: list[str], methods: list[str] | None, bits: list[int]) -> list[Cell]:
    """What is asked for, in order."""
    return [Cell(t, m, b) for b in bits for t in tools for m in TOOLS[t] if methods is None or m in methods]


def make(cell: Cell, given: argparse.Namespace, model: Path, ids: Path) -> Path:
    """The dense weights of a cell, by its driver unless they are there.

    Raises:
        RuntimeError: The driver failed; says with what last words.
    """
    how = f"{given.samples}x{given.seq_len}.{given.steps}x{given.batch_size}"
    out = Path(given.work) / f"{cell}.{how}.safetensors"
    if out.exists():
        return out
    env = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(given.threads), "TOKENIZERS_PARALLELISM": "false"}
    python = str(Path(given.venvs) / cell.tool / "bin" / "python")
    env.pop("PYTHONPATH", None)
    if cell.tool == "qat":
        found = os.environ.get("PYTHONPATH")
        python, env["PYTHONPATH"] = sys.executable, os.pathsep.join([str(HERE.parents[1]), *([found] if found else [])])
    command = [python, str(HERE / "peers" / f"run_{cell.tool}.py"), "--model", str(model), "--ids", str(ids)]
    command += ["--out", str(out), "--method", cell.method, "--bits", str(cell.bits), "--group-size", str(GROUP)]
    command += ["--steps", str(given.steps), "--batch-size", str(given.batch_size), "--device", given.device]
    try:
        done = subprocess.run(command, env=env, cwd=given.work, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"{cell}: no environment ({error})") from None
    out.with_suffix(".log").write_text(done.stdout + done.stderr, encoding="utf-8")
    if done.returncode or not out.exists():
        said = "\n".join((done.stdout + done.stderr).strip().splitlines()[-5:])
        raise RuntimeError(f"{cell}: its driver ended with {done.returncode}:\n{said}")
    return out


def check(model: PreTrainedModel, dense: Mapping[str, Tensor], bits: int) -> None:
    """Holds a tool to the task: all parameters, finite, linears on the grid, head and embedding untouched.

    Raises:
        ValueError: Names the parameter that breaks the rule.
    """
    known = dict(model.named_parameters())
    inside = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)} - {"lm_head"}
    for name, value in dense.items():
        if name not in known and name != "lm_head.weight":
            raise ValueError(f"{name}: the model has no such parameter")
        own = model.get_parameter(name)
        if own.shape != value.shape:
            raise ValueError(f"{name}: {tuple(value.shape)}, expected {tuple(own.shape)}")
        outside = name in ("lm_head.weight", "model.embed_tokens.weight")
        if outside and not torch.equal(value, own):
            raise ValueError(f"{name}: changed, but only linears of the blocks may be")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name}: not finite")
    if missing := sorted(known.keys() - dense.keys()):  # the full-precision one would be judged in its place
        raise ValueError(f"{missing[0]}: not there")
    for name in sorted(inside):
        groups = dense[f"{name}.weight"].reshape(-1, GROUP).sort(-1).values
        levels = int((groups.diff() > 0).sum(-1).max()) + 1
        if levels > 2**bits:
            raise ValueError(f"{name}.weight: a group of {GROUP} has {levels} values, {bits} bits hold {2**bits}")


class Remembered(nn.Module):
    """The full-precision model, asked for the same windows by every row: it computes their logits once."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model, self.known = model, dict[bytes, Any]()

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        """What the model says."""
        key = input_ids.numpy().tobytes()
        if key not in self.known:
            self.known[key] = self.model(input_ids=input_ids, use_cache=use_cache)
        return self.known[key]


def judged(graph: Any, windows: Tensor, full: Remembered, reference: Row | None = None) -> Row:
    """Perplexity, nll and KL, and what paired errors need; `reference` is the full-precision row, once there is one."""
    scores = evaluate(graph, windows, full)
    assert scores.kl is not None
    assert scores.agree is not None
    nll = mean(scores.nll, scores.tokens)
    paired = None if reference is None else torch.tensor(reference["windows"]["nll"], dtype=torch.float64)
    return {
        "ppl": float(torch.tensor(nll, dtype=torch.float64).exp()),
        "nll": nll,
        "nll_se": standard_error(scores.nll, scores.tokens, paired),
        "kl": mean(scores.kl, scores.tokens),
        "top1_agree": mean(scores.agree, scores.tokens),
        "tokens": scores.tokens * len(windows),
        "windows": {"nll": _short(scores.nll), "kl": _short(scores.kl)},
    }


def row_of(cell: Cell, file: Path, full: Remembered, windows: Tensor, reference: Row) -> Row:
    """A cell's row, from the dense weights that its driver left.

    Raises:
        ValueError: See `check`.
    """
    dense = load_file(file)
    check(full.model, dense, cell.bits)
    with safe_open(file, framework="pt") as handle:
        took = json.loads(handle.metadata()["row"])
    dense.pop("lm_head.weight", None)  # tied: the same as the embedding, as `check` saw
    graph = apply(full.model, {}, dense)
    return cell._asdict() | {"recipe": cell.recipe} | judged(graph, windows, full, reference) | took


def pairs(rows: list[Row]) -> list[Row]:
    """Each peer's row beside ours of the same method and grid; differences are ours less theirs, in nats per token."""
    found = []
    by = {(row["tool"], row["method"], row["recipe"]): row for row in rows}
    for theirs in rows:
        for method in OURS.get(theirs["method"], ()) if theirs["tool"] != "qat" else ():
            ours = by.get(("qat", method, theirs["recipe"]))
            if ours is None:
                continue
            one: Row = {key: theirs[key] for key in ("recipe", "tool", "method")} | {"ours": method}
            for key in ("ppl", "kl"):
                one |= {key: theirs[key], f"our_{key}": ours[key]}
            tokens = ours["tokens"] // len(ours["windows"]["nll"])
            for key in ("nll", "kl"):
                mine, other = (torch.tensor(row["windows"][key], dtype=torch.float64) for row in (ours, theirs))
                difference, error = mean(mine - other, tokens), standard_error(mine, tokens, other)
                one |= {f"{key}_difference": difference, f"{key}_errors": difference / error if error else None}
            found.append(one)
    return sorted(found, key=lambda one: (-int(one["recipe"][1]), one["tool"], one["method"]))


def calibrated(cell: Cell, given: argparse.Namespace) -> str:
    """On what a row is calibrated, in words, with AutoRound's steps."""
    steps = f", {given.steps} steps of {given.batch_size}" if cell.method == "autoround" else ""
    return f"{given.samples} x {given.seq_len} of train, seed 0{steps}"


def fill(
    file: Path,
    content: dict[str, Any],
    wanted: Mapping[Cell, str],
    produce: Callable[[Cell], Row],
) -> list[Cell]:
    """Adds the rows that are wanted and not there, one by one to the file; returns those that could not be had.

    Args:
        file: The results.
        content: What it holds.
        wanted: Cells and what each is to be `calibrated` on; a row of anything else is made again, in its place.
        produce: Makes a row.
    """
    failed = []
    for cell, data in wanted.items():
        rows = {(row["tool"], row["method"], row["recipe"]): row for row in content["rows"]}
        if cell.key in rows and rows[cell.key]["calibration"] == data:
            continue
        try:
            row = produce(cell)
        except (RuntimeError, ValueError) as error:
            print(error, file=sys.stderr)
            failed.append(cell)
            continue
        rows[cell.key] = row | {"calibration": data, "commit": content["meta"]["commit"]}
        content["rows"] = list(rows.values())
        content["pairs"] = pairs(content["rows"])
        write(file, content)
        print(f"{cell}: ppl {row['ppl']:.3f}, KL {row['kl']:.4f}", file=sys.stderr)
    return failed


def table(rows: list[Row]) -> str:
    """All rows, as Markdown."""
    lines = []
    for row in rows:
        took = [f"{row[key]:.0f}" if key in row else "—" for key in ("seconds", "cpu_seconds", "peak_mem_mb")]
        named = [f"`{row['recipe']}`", row["tool"], f"`{row['method']}`"]
        lines.append(
            [*named, f"{row['ppl']:.3f}", f"{row['nll']:.4f}", f"{row['kl']:.4f}", *took, row.get("scale_dtype", "—")]
        )
    return _markdown(["recipe", "tool", "method", "ppl", "nll", "KL", "s", "CPU s", "peak MiB", "scales"], lines)


def pairs_tables(found: list[Row]) -> list[str]:
    """Each peer's row beside ours as we recommend it, and beside ours with scales like theirs, where there are any."""
    alike = [one for one in found if one["ours"].endswith("_ct")]
    return [pairs_table(rows) for rows in ([one for one in found if one not in alike], alike) if rows]


def pairs_table(found: list[Row]) -> str:
    """Peers' rows beside ours, as Markdown; negative differences are ours being better."""
    lines = []
    for one in found:
        line = [f"`{one['recipe']}`", one["tool"], f"`{one['method']}`", f"{one['ppl']:.3f}", f"{one['kl']:.4f}"]
        line += [f"`{one['ours']}`", f"{one['our_ppl']:.3f}", f"{one['our_kl']:.4f}"]
        for key in ("nll", "kl"):
            errors = one[f"{key}_errors"]
            line += [f"{one[f'{key}_difference']:+.4f}", "—" if errors is None else f"{errors:+.1f}"]
        lines.append(line)
    header = ["recipe", "peer", "method", "ppl", "KL", "ours", "ppl", "KL", "Δ nll", "in s.e.", "Δ KL", "in s.e."]
    return _markdown(header, lines)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", required=True, type=Path)
    parser.add_argument("--tokens", required=True, type=Path, help="a prepared token directory")
    parser.add_argument("--venvs", required=True, type=Path, help="holds a virtual environment for each peer")
    parser.add_argument("--work", type=Path, default=Path("runs/peers"))
    parser.add_argument("--model", default=None, help="a Hugging Face directory or GGUF file; default: the demo model")
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), choices=list(TOOLS))
    parser.add_argument("--methods", nargs="+", default=None, choices=sorted({m for ms in TOOLS.values() for m in ms}))
    parser.add_argument("--bits", nargs="+", type=int, default=[4, 3, 2])
    parser.add_argument("--samples", type=int, default=16, help="calibration windows")
    parser.add_argument("--seq-len", type=int, default=512, help="of calibration and test windows")
    parser.add_argument("--windows", type=int, default=24, help="of the test split")
    parser.add_argument("--steps", type=int, default=200, help="of AutoRound, for each block, ours and theirs")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences for each of these steps")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="of drivers; the judge is a CPU's")
    parser.add_argument("--keep", action="store_true", help="dense weights stay in --work after they were judged")
    found = parser.parse_args()
    found.work, found.venvs = found.work.absolute(), found.venvs.absolute()
    return found


def main() -> None:
    """Makes and judges what is left, and prints the tables."""
    given = arguments()
    torch.set_num_threads(given.threads)
    given.work.mkdir(parents=True, exist_ok=True)
    model, tokenizer = hf.load(*([hf.DEMO] if given.model is None else [given.model, given.model]))
    tokens = load(given.tokens)
    source, ids = given.work / "model", given.work / "calibration.safetensors"
    if not (source / "config.json").exists():
        model.save_pretrained(source)
        tokenizer.save_pretrained(source)
    save_file({"ids": torch.cat(calibration(tokens, given.samples, given.seq_len, seed=0))}, ids)
    windows, full = tokens.windows("test", given.seq_len, given.windows), Remembered(model)

    content = read(given.json)
    content["meta"] = {
        "device": device_name(torch.device("cpu")),
        "threads": given.threads,
        "versions": versions(),
        "commit": (git() or {}).get("sha"),
        "date": datetime.now(UTC).date().isoformat(),
        "argv": [Path(word).name if Path(word).is_absolute() else word for word in sys.argv],
        "data": tokens.fingerprint,
    }
    if not content["rows"]:
        content["rows"].append({"tool": "-", "method": "fp", "recipe": "-"} | judged(full, windows, full))
        write(given.json, content)
    reference = content["rows"][0]

    def produce(cell: Cell) -> Row:
        file = make(cell, given, source, ids)
        row = row_of(cell, file, full, windows, reference)
        if not given.keep:
            file.unlink()
        return row

    wanted = {cell: calibrated(cell, given) for cell in cells(given.tools, given.methods, given.bits)}
    failed = fill(given.json, content, wanted, produce)
    mark = f"<!-- from: {given.json} -->"
    print("\n\n".join(f"{mark}\n{text}" for text in [table(content["rows"]), *pairs_tables(pairs(content["rows"]))]))
    sys.exit(1 if failed else 0)


def _short(sums: Tensor) -> list[float]:
    """Sums over the tokens of a window, to a thousandth of a nat."""
    return [round(value, 3) for value in sums.tolist()]


def _markdown(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *lines])


if __name__ == "__main__":
    main()
