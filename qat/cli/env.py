"""`qat env`: what a bug report needs. Keys and tokens are never printed, only whether they are there."""

import argparse
import json
import netrc
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qat.cli.errors import EXTRAS

PACKAGES = (
    *("torch", "pytorch-lightning", "hydra-core", "omegaconf", "transformers", "accelerate", "datasets", "safetensors"),
    *("compressed-tensors", "gguf", "torchmetrics", "wandb", "triton", "fastapi", "uvicorn", "matplotlib"),
)
WANDB_HOST = "api.wandb.ai"


def main(argv: list[str]) -> int:
    """Prints the environment as a table, or as JSON with `--json`."""
    parser = argparse.ArgumentParser(prog="qat env", add_help=False)
    parser.add_argument("--json", action="store_true")
    facts = gather()
    if parser.parse_args(argv).json:
        print(json.dumps(facts, indent=2))
        return 0
    flat = {f"{key}.{name}": v for key, value in facts.items() if isinstance(value, dict) for name, v in value.items()}
    flat = {key: value for key, value in facts.items() if not isinstance(value, dict)} | flat
    width = max(map(len, flat))
    for key, value in flat.items():
        print(f"{key:<{width}}  {_shown(value)}")
    return 0


def gather() -> dict[str, Any]:
    """Everything, as JSON takes it."""
    import torch

    import qat

    return {
        "qat": qat.__version__,
        "git": git_sha(),
        "python": platform.python_version(),
        "os": platform.platform(),
        "cpu": {
            "model": cpu_model(),
            "cores": os.cpu_count(),
            "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "isa": torch.backends.cpu.get_cpu_capability(),
            "torch_threads": torch.get_num_threads(),
        },
        "cuda": {
            "version": torch.version.cuda,
            "devices": [_device(torch.cuda.get_device_properties(i)) for i in range(torch.cuda.device_count())],
        },
        "packages": {name: package_version(name) for name in PACKAGES},
        "extras": {extra: extra_installed(extra) for extra in sorted(set(EXTRAS.values()))},
        "directories": {"cache": str(cache_dir()), "runs": str(Path(os.environ.get("QAT_RUNS", "runs")).absolute())},
        "wandb_key": has_wandb_key(),
    }


def cache_dir() -> Path:
    """Where rebuilt models and prepared tokens are kept, as `qat.models.hf` says it (whose import takes seconds)."""
    return Path(os.environ.get("QAT_CACHE") or Path.home() / ".cache" / "qat")


def package_version(name: str) -> str | None:
    """The installed version of a package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def extra_installed(extra: str) -> bool:
    """Whether every package of an extra is there."""
    return all(find_spec(package) is not None for package, brings in EXTRAS.items() if brings == extra)


def git_sha() -> str | None:
    """The commit of a source tree, `-dirty` if it has changes; None for an installed package."""
    root = Path(__file__).resolve().parents[2]
    git = shutil.which("git")
    if git is None or not (root / ".git").exists():
        return None
    command = [git, "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or None


def cpu_model() -> str:
    """The processor's name, as the kernel has it where there is one to ask."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def has_wandb_key() -> bool:
    """Whether W&B would find a key: in the environment, or in the netrc file."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(WANDB_HOST) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _device(properties: Any) -> dict[str, Any]:
    return {
        "name": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
    }


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "; ".join(" ".join(map(str, item.values())) for item in value) or "none"
    if value is None:
        return "-"
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)
