"""What the drivers that open our files share: `python open_<peer>.py MANIFEST.json`, which `scripts/interop.py` writes.

The manifest lists `path` (an export), `expected` (our weights of it, a safetensors file) and `dtype` (in which to
decode). A driver prints a line of JSON for each: how many weights it has in common with ours, and the largest
difference, or the `error` that it met.
"""

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

Tensors = Mapping[str, torch.Tensor]


def compared(found: Tensors, expected: Tensors) -> dict[str, Any]:
    """Weights in common, ours, and the largest difference; another shape or dtype, and NaN, count as infinite."""
    worst = 0.0
    for name in found.keys() & expected.keys():
        theirs, ours = found[name], expected[name]
        if theirs.shape != ours.shape or theirs.dtype != ours.dtype:
            worst = float("inf")
        else:
            difference = (theirs.double() - ours.double()).abs().nan_to_num(nan=torch.inf)
            worst = max(worst, float(difference.max()))
    return {"weights": len(found.keys() & expected.keys()), "of": len(expected), "max_abs_diff": worst}


def run(decode: Callable[[Path, torch.dtype, list[str]], tuple[Tensors, str]]) -> None:
    """Opens what the manifest lists; `decode` returns weights by module, and what decoded them."""
    for row in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        expected = load_file(row["expected"])
        try:
            found, by = decode(Path(row["path"]), getattr(torch, row["dtype"]), list(expected))
            said = {"by": by} | compared(found, expected)
        except Exception as error:  # whatever a peer raises belongs in the table
            said = {"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"}
        print("\n" + json.dumps(said), flush=True)
