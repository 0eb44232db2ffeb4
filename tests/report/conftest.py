"""Run directories as `qat run` leaves them, with numbers that can be followed."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

CONFIG: dict[str, Any] = {
    "choices": {"experiment": "quick", "recipe": "w4"},
    "verb": "run",
    "runs": "runs",
    "resume": "auto",
    "dry_run": False,
    "logger": {"wandb": None},
    "seed": 1,
    "model": {"name": "small", "path": None},
    "data": {"seq_len": 32},
    "optim": {"lr": 1e-4, "betas": [0.9, 0.95]},
    "callbacks": {},
    "evaluation": {"seq_len": 32, "windows": 4},
}
FACTS: dict[str, Any] = {"status": "finished", "device": "A CPU", "data": {"fingerprint": "f00d" * 16}}


def arm(ppl: float, kl: float, size: int, **more: Any) -> dict[str, Any]:
    return {
        "ppl": ppl,
        "nll": ppl / 10,
        "nll_se": 0.01,
        "tokens": 124,
        "kl": kl,
        "top1_agree": 1 - kl,
        "bits_per_weight": 5.5,
        "bits_per_quantized_weight": 4.25,
        "bytes": size,
        "seconds": 12.4,
        "cpu_seconds": 20.6,
        "peak_mem_mb": 321,
        "fallbacks": [],
    } | more


SUMMARY: dict[str, Any] = {
    "arms": {"fp": arm(10.0, 0.0, 2_000_000), "gptq": arm(12.0, 0.2, 700_000), "qat": arm(11.0, 0.05, 700_000)},
    "recovered": {
        "vs_gptq": {"kl": 0.75, "nll": None},
        "vs_best_ptq": {"kl": {"value": 0.75, "winner": "gptq"}, "nll": {"value": None, "winner": "gptq"}},
    },
    "export": {"verified": True},
}


def merged(node: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A copy with dotted keys set."""
    node = copy.deepcopy(node)
    for key, value in changes.items():
        *path, last = key.split(".")
        at = node
        for part in path:
            at = at[part]
        at[last] = value
    return node


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run directory; changes are dotted keys."""

    def make(name: str, config: Any = None, facts: Any = None, summary: Any = None) -> Path:
        path = tmp_path / "quick" / name
        path.mkdir(parents=True)
        (path / "config.yaml").write_text(yaml.safe_dump(merged(CONFIG, config or {})))
        (path / "run.json").write_text(json.dumps(merged(FACTS, facts or {})))
        (path / "summary.json").write_text(json.dumps(merged(SUMMARY, summary or {})))
        return path

    return make
