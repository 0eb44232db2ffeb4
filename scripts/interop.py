"""What other people's loaders make of our files: every quantized weight, bit for bit.

    python scripts/interop.py --venvs DIR [--work DIR] [--layers N] [--json FILE] [-- peer ...]

Exports the demo model, rounded to nearest, in every format that a peer opens, and lets the peer decode it in its own
virtual environment VENVS/<peer>: GPTQModel the layouts of GPTQ and AWQ, llm-compressor's environment, through
transformers and compressed-tensors, the native one. Its weights must equal ours in the same dtype. Exit 0 only if all
do.
"""

import argparse
import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qat.cli.rundir import git  # noqa: E402
from qat.engine.loader import FORMATS  # noqa: E402
from qat.models import hf  # noqa: E402
from qat.nn.observers.minmax import MinMax  # noqa: E402
from qat.numerics.granularity import PerGroup  # noqa: E402
from qat.numerics.grid import IntGrid  # noqa: E402
from qat.numerics.qtensor import QuantizedTensor, consecutive  # noqa: E402
from qat.numerics.recipe import Recipe, Rule  # noqa: E402
from qat.numerics.scheme import Scheme  # noqa: E402
from qat.ptq.rtn import rtn  # noqa: E402

Row = dict[str, Any]


@dataclass(frozen=True)
class File:
    """One export, the peer that opens it, and the dtypes in which it decodes.

    Attributes:
        format: A format of `qat.formats`.
        peer: The environment.
        scheme: Of every linear but the head.
        dtypes: Names of dtypes.
        g_idx: Whether groups are of in-features here and there; the weight is then another than was rounded.
    """

    format: str
    peer: str
    scheme: Scheme
    dtypes: tuple[str, ...]
    g_idx: bool = False

    def __str__(self) -> str:
        sym = "sym" if self.scheme.symmetric else "asym"
        return f"{self.format}_w{self.scheme.grid.bits}_{sym}{'_g_idx' if self.g_idx else ''}"


def _scheme(bits: int, symmetric: bool) -> Scheme:
    return Scheme(IntGrid(bits), PerGroup(64), symmetric, convention="signed")  # with zero points it is ct


FILES = (
    *(
        File("gptq", "gptqmodel", _scheme(bits, s), ("float16", "bfloat16"))
        for s in (True, False)
        for bits in (4, 3, 2, 8)
    ),
    *(File("gptq", "gptqmodel", _scheme(4, s), ("float16", "bfloat16"), g_idx=True) for s in (True, False)),
    *(File("awq", "gptqmodel", _scheme(4, s), ("float16", "bfloat16")) for s in (True, False)),
    *(File("compressed_tensors", "llmcompressor", _scheme(bits, True), ("bfloat16",)) for bits in (4, 3, 2, 8)),
)


def export(file: File, model: Any, tokenizer: Any, work: Path) -> list[Row]:
    """Writes an export and, beside it, what we decode from it; a row for each dtype, still without a verdict."""
    head = Rule("lm_head", None)
    recipe = Recipe({"linears": Rule(".*_proj", file.scheme), "head": head})
    tensors, path, rows = rtn(model, recipe, [], observer=MinMax()).tensors, work / str(file), []
    if file.g_idx:
        tensors = {name: scattered(tensor) for name, tensor in tensors.items()}
    module = FORMATS[file.format]
    module.save(path, model, *module.expressed(recipe, tensors), {}, tokenizer)
    read = module.load(path)
    for name in file.dtypes:
        expected = work / f"{file}.{name}.safetensors"
        save_file({key: tensor.dequantize(getattr(torch, name)) for key, tensor in read.tensors.items()}, expected)
        rows.append({"file": str(file), "peer": file.peer, "dtype": name, "path": str(path), "expected": str(expected)})
    return rows


def scattered(tensor: QuantizedTensor) -> QuantizedTensor:
    """The same codes and scales under a g_idx, drawn once for each number of in-features."""
    columns = tensor.shape[1]
    places = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
    return replace(tensor, g_idx=consecutive(columns, tensor.scale.shape[1])[places])


def opened(rows: list[Row], peer: str, venvs: Path, work: Path) -> list[Row]:
    """Rows with the peer's verdicts: how many weights it decoded and the largest difference from ours, or its error."""
    named = [{key: row[key] for key in ("file", "peer", "dtype")} for row in rows]
    manifest = work / f"{peer}.json"
    manifest.write_text(json.dumps(rows), encoding="utf-8")
    script = ROOT / "scripts" / "reproduce" / "peers" / f"open_{peer}.py"
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    try:
        command = [str(venvs / peer / "bin" / "python"), str(script), str(manifest)]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
    except OSError as error:
        return [row | {"error": f"no environment: {error.strerror}"} for row in named]
    said = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{") and '"' in line[:2]]
    last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
    said += [{"error": f"ended with {done.returncode}: {last}"}] * (len(rows) - len(said))
    return [row | verdict for row, verdict in zip(named, said, strict=True)]


def passed(row: Row) -> bool:
    """Whether a peer decoded weights, all of ours, and no bit differs."""
    return "error" not in row and row["weights"] == row["of"] > 0 and row["max_abs_diff"] == 0


def table(rows: list[Row]) -> str:
    """Markdown."""
    lines = [["file", "peer", "by", "dtype", "weights", "largest difference"], ["---"] * 6]
    for row in rows:
        said = row.get("error") or f"{row['max_abs_diff']:g}"
        count = f"{row['weights']} of {row['of']}" if "weights" in row else "—"
        lines.append([f"`{row['file']}`", row["peer"], row.get("by", "—"), row["dtype"], count, said])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def main() -> int:
    """Exports, lets peers decode, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--venvs", required=True, type=Path)
    parser.add_argument("--work", type=Path, default=Path("runs/interop"))
    parser.add_argument("--layers", type=int, default=None, help="of the demo model, the first ones; default: all")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("peers", nargs="*", help="default: those that have an environment")
    given = parser.parse_args()
    venvs, work = given.venvs.absolute(), given.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    peers = given.peers or [folder.name for folder in venvs.iterdir()]
    model, tokenizer = hf.load()
    if given.layers is not None:
        model.model.layers = model.model.layers[: given.layers]
        model.config.num_hidden_layers = given.layers
    rows: list[Row] = []
    for peer in peers:
        mine = [row for file in FILES if file.peer == peer for row in export(file, model, tokenizer, work)]
        rows += opened(mine, peer, venvs, work) if mine else []
    print(table(rows))
    if given.json is not None:
        content = {"meta": {"commit": (git() or {}).get("sha"), "layers": given.layers}, "rows": rows}
        given.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0 if rows and all(map(passed, rows)) else 1


if __name__ == "__main__":
    sys.exit(main())
