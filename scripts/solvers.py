"""Our GPTQ solver beside llm-compressor's: codes of the same weights and Hessians, one by one.

    python scripts/solvers.py --venvs DIR [--work DIR] [--json FILE]

Both take min-max ranges of the original weights (scales in fp32), the same damping and blocks, and columns from left to
right or in the order of the Hessian's diagonal. They differ in fp32 alone: theirs factors the Hessian in it, ours in
fp64, and each sums in an order of its own. So a value near a tie may be rounded to either side, and its error moves
what comes after it in the row. `replay` tells in fp64 what a solver had before each rounding, given its own codes
before that one. Everything is explained if

    every code of ours is the nearest level to that, within ROUNDING steps,
    every code of theirs is, within ROUNDING steps over the factor that it computed, and FACTOR over the exact one,
    and the first code of a row that differs lies within FACTOR steps of the tie between the two.

Then what differs later in the row follows from the first. Exit 0 only if scales are equal and all codes are explained.
Scales are fp32 here because in bf16 theirs also rounds what a code means to bf16 before it hands its error on.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qat.cli.rundir import git  # noqa: E402
from qat.data.calibration import calibration  # noqa: E402
from qat.data.sources import PythonDocs  # noqa: E402
from qat.data.text import prepare  # noqa: E402
from qat.models import hf  # noqa: E402
from qat.nn.observers.minmax import MinMax  # noqa: E402
from qat.numerics.granularity import PerChannel, PerGroup  # noqa: E402
from qat.numerics.grid import IntGrid  # noqa: E402
from qat.numerics.scheme import Scheme  # noqa: E402
from qat.ptq import base  # noqa: E402
from qat.ptq.gptq_solver import (  # noqa: E402
    Order,
    accumulate_hessian,
    column_order,
    inverse_factor,
    quantize_weight,
    spread,
)

Row = dict[str, Any]
Problem = tuple[Tensor, Tensor]  # weight [O, I] and Hessian [I, I], fp32
Solved = tuple[Tensor, Tensor]  # codes [O, I] and scale
PARTS = ("weight", "hessian")
SHAPES = ((64, 128), (96, 320), (192, 576), (64, 1536))
LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
ROUNDING, FACTOR = 1e-5, 1e-3  # steps between levels; by chance one value in 50 000, or 500, is that near to a tie


@dataclass(frozen=True)
class Case:
    """One problem on one grid; without `group_size` there is a scale for each row."""

    problem: str
    bits: int
    group_size: int | None
    order: Order
    damping: float = 0.01
    block_size: int = 128

    @property
    def name(self) -> str:
        """Of its tensors in files."""
        return f"{self.problem} {self.scheme} {self.order}"

    @property
    def scheme(self) -> Scheme:
        """The grid."""
        return Scheme(IntGrid(self.bits), PerChannel() if self.group_size is None else PerGroup(self.group_size))


def random_problem(rows: int, columns: int, seed: int) -> Problem:
    """A weight, and the Hessian of correlated inputs of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(2 * columns, columns // 4, generator=generator)
    x = mixed @ torch.randn(columns // 4, columns, generator=generator)
    x = (x + torch.randn(x.shape, generator=generator)) * torch.rand(columns, generator=generator).mul(4).exp()
    hessian = torch.zeros(columns, columns)
    accumulate_hessian(hessian, x)
    return torch.randn(rows, columns, generator=generator), hessian


@torch.no_grad()
def model_problems(samples: int = 4) -> dict[str, Problem]:
    """Linears of the demo model's first block, and what they hear of calibration text."""
    model, tokenizer = hf.load()
    model.model.layers = model.model.layers[:1]
    batches = calibration(prepare(PythonDocs(), tokenizer, hf.cache_dir() / "tokens"), samples, 512)
    linears = {name: model.model.layers[0].get_submodule(name) for name in LINEARS}
    return {f"layers.0.{name}": (linear.weight.float().clone(), heard(model, linear, batches)) for name, linear in
            linears.items()}  # fmt: skip


def heard(model: Any, linear: Any, batches: list[Tensor]) -> Tensor:
    """The Hessian of a linear on calibration tokens."""
    hessian = torch.zeros(linear.in_features, linear.in_features)
    with base.listening(linear, lambda args, _: accumulate_hessian(hessian, base.rows(args[0]))):
        for ids in batches:
            model.model(ids)
    return hessian


def cases(problems: dict[str, Problem]) -> list[Case]:
    """Every problem at every width, granularity and order."""
    orders: tuple[Order, ...] = ("none", "static")
    return [Case(*what) for what in product(problems, (4, 3), (64, None), orders)]


def ours(problem: Problem, case: Case) -> Solved:
    """What our solver finds, set as theirs is."""
    tensor, row = quantize_weight(
        *problem, case.scheme, observer=MinMax(), act_order=case.order, groups="static", damping=case.damping,
        block_size=case.block_size, dtype=torch.float32
    )  # fmt: skip
    assert row["fallback"] is None, f"{case.name}: {row['fallback']}"
    return tensor.codes, tensor.scale


def theirs(problems: dict[str, Problem], asked: list[Case], python: Path, work: Path) -> tuple[dict[str, Tensor], str]:
    """What their solver finds, in an environment of its own: see `solve_llmcompressor.py`; and its version.

    Raises:
        RuntimeError: It ended with an error.
    """
    work.mkdir(parents=True, exist_ok=True)
    source, target = work / "problems.safetensors", work / "solved.safetensors"
    given = {f"{name}.{part}": t for name, pair in problems.items() for part, t in zip(PARTS, pair, strict=True)}
    save_file(given, source, {"cases": json.dumps([asdict(case) | {"name": case.name} for case in asked])})
    script = ROOT / "scripts" / "reproduce" / "peers" / "solve_llmcompressor.py"
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(python), str(script), str(source), str(target)], env=env, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{script.name} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    with safe_open(target, framework="pt") as file:
        return load_file(target), file.metadata()["by"]


def exact_factor(problem: Problem, case: Case) -> Tensor:
    """The factor of the inverse Hessian in the order of the columns, fp64."""
    order = column_order(problem[1].diagonal(), case.order, 1)
    factor, used, failure = inverse_factor(problem[1][order][:, order], case.damping)
    assert factor is not None, f"{case.name}: {failure}"
    assert used == case.damping, f"{case.name}: it took a damping of {used}"
    return factor


def replay(problem: Problem, case: Case, solved: Solved, factor: Tensor) -> Tensor:
    """What GPTQ has before each rounding, in steps and in fp64, given the codes that were chosen before (`[O, I]`).

    With the weight W, what the codes mean Q and the factor U, in the order of the columns: column j has become
    `V_j = W_j - sum_{i<j} E_i U_ij`, and hands on `E_j = (V_j - Q_j) / U_jj`. So `W - Q = E U`, which is solved for E,
    and `V_j = Q_j + E_j U_jj`.
    """
    codes, scale = solved
    weight, order = problem[0].double(), column_order(problem[1].diagonal(), case.order, 1)
    steps = spread(scale.double(), weight)
    meant, before = codes.double() * steps, torch.empty_like(weight)
    errors = torch.linalg.solve_triangular(factor.double(), (weight - meant)[:, order], upper=True, left=False)
    before[:, order] = meant[:, order] + errors * factor.double().diagonal()
    return before / steps


def off(before: Tensor, codes: Tensor, grid: IntGrid) -> Tensor:
    """How far values lie outside of what is rounded to their codes, in steps; outermost levels take all beyond them."""
    below = (codes - 0.5 - before).masked_fill(codes == grid.qmin, 0)
    above = (before - codes - 0.5).masked_fill(codes == grid.qmax, 0)
    return torch.maximum(below, above).clamp(min=0)


def compared(problem: Problem, case: Case, mine: Solved, other: Solved, factor: Tensor) -> Row:
    """How many codes differ, and what explains them; `factor` is the one that they computed."""
    order, exact, grid = (
        column_order(problem[1].diagonal(), case.order, 1),
        exact_factor(problem, case),
        case.scheme.grid,
    )
    assert isinstance(grid, IntGrid)
    before = replay(problem, case, mine, exact)
    off_ours = off(before, mine[0], grid)
    off_theirs, off_exact = (off(replay(problem, case, other, u), other[0], grid) for u in (factor, exact))
    differ = (mine[0] != other[0])[:, order]
    first = differ & (differ.cumsum(1) == 1)
    middle = (mine[0].double() + other[0]) / 2
    near = ((before - middle).abs() <= FACTOR) & ((mine[0].int() - other[0]).abs() == 1)
    beyond = (off_ours > ROUNDING).sum() + ((off_theirs > ROUNDING) | (off_exact > FACTOR)).sum()
    return {
        "problem": case.problem, "bits": case.bits, "group_size": case.group_size, "order": case.order,
        "scales_equal": torch.equal(mine[1], other[1]), "codes": differ.numel(), "equal": int((~differ).sum()),
        "differing": int(differ.sum()), "first_of_a_row": int(first.sum()),
        "near_a_tie": int((first & near[:, order]).sum()), "unexplained": int(beyond),
        "ours_off": float(off_ours.max()), "theirs_off": float(off_theirs.max()),
        "theirs_off_exact_factor": float(off_exact.max()),
    }  # fmt: skip


def explained(row: Row) -> bool:
    """Whether scales are equal, and codes where values do not lie near ties."""
    return bool(row["scales_equal"] and row["unexplained"] == 0 and row["near_a_tie"] == row["first_of_a_row"])


def summary(rows: list[Row]) -> list[Row]:
    """One row for each problem: sums, and the largest distances."""
    found = []
    for name in dict.fromkeys(row["problem"] for row in rows):
        mine = [row for row in rows if row["problem"] == name]
        one: Row = {"problem": name, "cases": len(mine), "explained": all(map(explained, mine))}
        one |= {key: sum(row[key] for row in mine) for key in SUMS}
        found.append(one | {key: max(row[key] for row in mine) for key in LARGEST})
    return found


SUMS = ("codes", "equal", "differing", "first_of_a_row", "near_a_tie", "unexplained")
LARGEST = ("ours_off", "theirs_off", "theirs_off_exact_factor")


def table(rows: list[Row]) -> str:
    """Markdown, of a summary."""
    heads = ("problem", "codes", "differing", "first of a row", "near a tie", "unexplained", *LARGEST)
    lines = [[name.replace("_", " ") for name in heads], ["---"] * len(heads)]
    for row in rows:
        counts = [f"{row[key]:,}" for key in SUMS if key != "equal"]
        lines.append([f"`{row['problem']}`", *counts, *(f"{row[key]:.1e}" for key in LARGEST)])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    """Solves everything twice, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venvs", required=True, type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/solvers"))
    parser.add_argument("--json", type=Path, default=None)
    given = parser.parse_args()
    random = {f"random {o}x{i}": random_problem(o, i, seed) for seed, (o, i) in enumerate(SHAPES)}
    problems, rows = random | model_problems(), []
    asked = cases(problems)
    python = given.venvs.absolute() / "llmcompressor" / "bin" / "python"
    found, by = theirs(problems, asked, python, given.work.absolute())
    for case in asked:
        problem, other = problems[case.problem], (found[f"{case.name}.codes"], found[f"{case.name}.scale"])
        rows.append(compared(problem, case, ours(problem, case), other, found[f"{case.problem} {case.order}.factor"]))
    total = summary(rows)
    print(f"{by}\n\n{table(total)}")
    if given.json is not None:
        meta = {"commit": (git() or {}).get("sha"), "by": by, "rounding": ROUNDING, "factor": FACTOR}
        content = {"meta": meta, "summary": total, "rows": rows}
        given.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0 if all(map(explained, rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
