"""How long PTQ takes, and how much memory of the GPU, on models of known shapes with random weights and tokens.

    python scripts/bench_ptq.py --json scripts/results/ptq_time.json [--shape llama3_8b llama32_1b] [--methods rtn gptq]
        [--layers N] [--limit SECONDS] [--samples 128] [--seq-len 2048] [--batch-size 4] [--device cuda]

The model, bf16, stays on the CPU; blocks go to the GPU one at a time. W4 g128, symmetric, on all linears of the blocks.
`gptq` and `awq` are those of `configs/method`, `gptq_paper` is on min-max ranges and does without GPTAQ. A method that
has not ended after `--limit` seconds, or is given `--layers` of the shape's blocks, has its `seconds` projected: those
of the blocks that it did, and the median block for each that is left. Other rows of the file stay.

Where time should go on an H100, counted, for each block of the 8B (262144 tokens: a forward has 1.1e14 flops, Hessians
1.3e14, of them `down_proj`'s 1.1e14). `gptq_paper`: two forwards (four stages, each as far as its linear, and what
goes on) 0.6 s; Hessians 0.3 s on bf16 tensor cores, where fp32 takes 2.7 s; factors in fp64 0.6 s; 26624 columns in
208 replayed graphs 1 s; copies 0.3 s. `gptq` besides: the other stream's forwards 0.6 s, two products for the cross
matrix 0.5 s, its fp32 products 0.3 s, 80 points 0.3 s. `awq`: 21 candidates of four mappings, 1.35 forwards each and
an error in fp32, 7 s, and clipping. For memory see `ptq_memory.py`.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from ptq_memory import SHAPES, Shape, peak
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from qat.cli.rundir import git, versions  # noqa: E402
from qat.nn.observers.minmax import MinMax  # noqa: E402
from qat.nn.observers.mse import MSE  # noqa: E402
from qat.numerics.granularity import PerGroup  # noqa: E402
from qat.numerics.grid import IntGrid  # noqa: E402
from qat.numerics.recipe import Recipe, Rule  # noqa: E402
from qat.numerics.scheme import Scheme  # noqa: E402
from qat.ptq.awq import awq  # noqa: E402
from qat.ptq.gptq import gptq  # noqa: E402
from qat.ptq.rtn import rtn  # noqa: E402
from qat.surgery.changes import Changes  # noqa: E402

WEIGHTS = Scheme(IntGrid(4), PerGroup(128), convention="signed")
RECIPE = Recipe({"linears": Rule(".*_proj", WEIGHTS), "lm_head": Rule("lm_head", None)})
METHODS: dict[str, Callable[..., Changes]] = {
    "rtn": partial(rtn, observer=MinMax()),
    "mse_rtn": partial(rtn, observer=MSE()),
    "gptq_paper": partial(gptq, observer=MinMax(), asymmetry=0.0, act_order="static"),
    "gptq": partial(gptq, observer=MSE(norm=2.4), asymmetry=0.25),
    "awq": partial(awq, observer=MinMax(), duo_scaling=False, clip=True),
}
COLUMNS = ("shape", "method", "blocks", "seconds", "peak GiB", "computed GiB")


class Enough(Exception):
    """A method has taken as long as it may."""


@torch.no_grad()
def build(shape: Shape, layers: int, device: str) -> LlamaForCausalLM:
    """A random model on the CPU, in bf16; numbers are drawn on the device, which is faster by far."""
    config = LlamaConfig(
        vocab_size=shape.vocab, hidden_size=shape.hidden, intermediate_size=shape.intermediate,
        num_hidden_layers=layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192, tie_word_embeddings=shape.tied, use_cache=False,
        bos_token_id=0, eos_token_id=0, pad_token_id=None,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.to_empty(device="cpu").tie_weights()
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # its frequencies are no parameters
    for parameter in model.parameters():
        parameter.requires_grad_(False)
        drawn = torch.ones(parameter.shape, dtype=parameter.dtype, device=device)
        parameter.copy_(drawn if parameter.dim() == 1 else drawn.normal_(0, 0.02))
    return model.eval()


def measure(
    method: Callable[..., Changes],
    model: LlamaForCausalLM,
    batches: list[torch.Tensor],
    limit: float,
    layers: int,
    device: str,
) -> dict[str, Any]:
    """Seconds and memory of a method; those of blocks that it did not get to are projected."""
    ends: list[float] = []

    def progress(done: int, blocks: int) -> None:
        ends.append(time.monotonic() - begin)
        if ends[-1] > limit and done < blocks:
            raise Enough

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begin, changes = time.monotonic(), Changes()
    try:
        changes = method(model, RECIPE, batches, progress=progress, device=device)
        ends.append(time.monotonic() - begin)  # codes are on the CPU: the GPU has ended
    except Enough:
        pass
    seconds, built = ends[-1], model.config.num_hidden_layers
    done = built if changes.tensors else len(ends)
    if done < layers:
        blocks = [after - before for before, after in pairwise(ends[:done])]
        each = statistics.median(blocks) if blocks else seconds / done  # RTN has no blocks: all is alike
        seconds += (layers - done) * each
    row: dict[str, Any] = {"seconds": seconds, "blocks": done, "layers": layers, "projected": done < layers}
    row["fallbacks"] = sum(bool(line.get("fallback")) for line in changes.layers)
    row["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None
    row["reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30 if torch.cuda.is_available() else None
    return row


def table(rows: list[dict[str, Any]]) -> str:
    """Measured beside computed memory, as Markdown; ~ before seconds that are projected."""
    lines = [list(COLUMNS), ["---"] * len(COLUMNS)]
    for row in rows:
        seconds, gib = f"{'~' if row['projected'] else ''}{row['seconds']:.1f}", row["peak_gib"]
        blocks = f"{row['blocks']} of {row['layers']}"
        measured = "-" if gib is None else f"{gib:.1f}"
        lines.append([row["shape"], row["method"], blocks, seconds, measured, f"{row['computed_gib']:.1f}"])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def main() -> None:
    """Measures, keeps every row at once, and prints the table last."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--shape", nargs="+", default=["llama3_8b"], choices=list(SHAPES))
    parser.add_argument("--methods", nargs="+", default=["rtn", "gptq_paper", "gptq", "awq"], choices=list(METHODS))
    parser.add_argument("--layers", type=int, help="blocks that the model really has; default: the shape's")
    parser.add_argument("--limit", type=float, default=1e6, help="seconds after which a method begins no block")
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--batch-size", type=int, default=4, help="sequences of a batch")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--commit", help="of the source; default: what git says")
    args = parser.parse_args()
    tokens, batch = args.samples * args.seq_len, args.batch_size * args.seq_len
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    meta: dict[str, Any] = {"device": name, "versions": versions(), "date": time.strftime("%Y-%m-%d")}
    meta |= {"commit": args.commit or (git() or {}).get("sha"), "argv": sys.argv}
    meta["computed_gib"] = {
        shape: {method: round(peak(SHAPES[shape], method, tokens, batch), 1) for method in METHODS} for shape in SHAPES
    }
    asked = [(shape, method) for shape in args.shape for method in args.methods]
    old = json.loads(args.json.read_text(encoding="utf-8"))["rows"] if args.json.exists() else []
    rows: list[dict[str, Any]] = [row for row in old if (row["shape"], row["method"]) not in asked]
    torch.manual_seed(0)
    warm = build(SHAPES["tiny"], 1, args.device)  # kernels are compiled, libraries begun
    for method in args.methods:
        measure(METHODS[method], warm, [torch.randint(512, (2, 32))], 1e6, 1, args.device)
    for shape in args.shape:
        found = SHAPES[shape]
        model = build(found, args.layers or found.layers, args.device)
        batches = list(torch.randint(found.vocab, (args.samples, args.seq_len)).split(args.batch_size))
        for method in args.methods:
            row = measure(METHODS[method], model, batches, args.limit, found.layers, args.device)
            computed = peak(found, method, tokens, batch)
            made = {"computed_gib": computed, "device": name, "commit": meta["commit"]}
            rows.append({"shape": shape, "method": method, **row, **made})
            print(json.dumps(rows[-1]), flush=True)
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.write_text(json.dumps({"meta": meta, "rows": rows}, indent=1) + "\n", encoding="utf-8")
        del model
    print(f"\ncomputed for llama3_70b, GiB: {meta['computed_gib']['llama3_70b']}\n\n{table(rows)}")


if __name__ == "__main__":
    main()
