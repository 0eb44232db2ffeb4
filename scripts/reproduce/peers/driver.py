"""What the drivers of all tools share: the command line, the clock, and the file of dense weights that they leave.

A driver runs in its tool's own virtual environment and imports nothing of this project but this file. It quantizes a
model that is loaded in fp32, with one seed, on the token ids of a file, and writes every parameter of the result in
fp32 under its Hugging Face name, quantized ones dequantized, so that one judge can read all tools alike. What it took
is in the file's metadata, under `row`: `seconds` and, of all threads, `cpu_seconds` (calibration and quantization,
without imports, loading and writing), `peak_mem_mb` (of the whole process; on a GPU what its tensors took there),
`device`, `scale_dtype`, `settings`, `versions`.
"""

import argparse
import json
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file, save_file

T = TypeVar("T")


def arguments(methods: tuple[str, ...]) -> argparse.Namespace:
    """The command line of a driver; `ids` becomes token ids, int64 `[samples, seq_len]`."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="a Hugging Face directory, in fp32")
    parser.add_argument("--ids", required=True, help="a safetensors file with calibration tokens under `ids`")
    parser.add_argument("--out", required=True, type=Path, help="the safetensors file to write")
    parser.add_argument("--method", required=True, choices=methods)
    parser.add_argument("--bits", required=True, type=int)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--steps", type=int, default=200, help="of AutoRound, for each block")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences for each of these steps")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    found = parser.parse_args()
    found.ids = load_file(found.ids)["ids"]
    torch.manual_seed(0)
    return found


def timed(work: Callable[[], T]) -> tuple[T, dict[str, float]]:
    """What a call gives, and the seconds that it took, on the clock and on processors."""
    start, busy = time.monotonic(), time.process_time()
    done = work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return done, {"seconds": time.monotonic() - start, "cpu_seconds": time.process_time() - busy}


def peak_mem_mb(device: str) -> float:
    """The largest resident size of this process so far, or of all tensors on its GPU, in MiB."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def save(
    given: argparse.Namespace,
    dense: Mapping[str, torch.Tensor],
    took: Mapping[str, float],
    scale_dtype: torch.dtype,
    settings: str,
    packages: tuple[str, ...],
) -> None:
    """Writes the file.

    Args:
        given: The command line.
        dense: Parameter name to its values; a head that is tied to the embedding may be left out.
        took: What `timed` said of quantization.
        scale_dtype: Dtype in which the tool keeps the scales behind the dense weights.
        settings: The settings that matter, in the tool's own words.
        packages: Distributions whose versions are recorded beside torch's.
    """
    row = {
        **took,
        "peak_mem_mb": peak_mem_mb(given.device),
        "device": torch.cuda.get_device_name() if given.device == "cuda" else "cpu",
        "scale_dtype": str(scale_dtype).removeprefix("torch."),
        "settings": settings,
        "versions": {name: version(name) for name in ("torch", "transformers", *packages)},
    }
    values = {name: value.detach().to("cpu", torch.float32).contiguous().clone() for name, value in dense.items()}
    part = given.out.with_suffix(".part")
    save_file(values, part, {"row": json.dumps(row)})
    part.replace(given.out)
