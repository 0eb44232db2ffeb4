"""What an arm costs: wall-clock and CPU seconds, and peak memory."""

import resource
import time
from pathlib import Path
from typing import Any

import torch


class Meter:
    """Measures from its creation to `read()`.

    Peak memory is that of the process on the CPU (reset at the start where Linux allows it, else since the process
    began), and of this process's tensors on a GPU.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._wall, self._cpu = time.monotonic(), _cpu_seconds()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            _reset_peak()

    def read(self) -> dict[str, Any]:
        """`{"seconds", "cpu_seconds", "peak_mem_mb"}` so far."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            peak = torch.cuda.max_memory_allocated(self.device) / 2**20
        else:
            peak = _peak_mb()
        return {
            "seconds": round(time.monotonic() - self._wall, 2),
            "cpu_seconds": round(_cpu_seconds() - self._cpu, 2),
            "peak_mem_mb": round(peak),
        }


def _cpu_seconds() -> float:
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def _reset_peak() -> None:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak_mb() -> float:
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
