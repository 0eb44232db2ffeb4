"""Reading runs back: what is in their directories, and why two of them may not be compared."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

EXEMPT = ("choices", "runs", "resume", "dry_run", "logger", "verb")


@dataclass(frozen=True)
class Run:
    """A run directory, read.

    Attributes:
        name: `<experiment>/<directory>`.
        path: The directory.
        config: Its resolved config, flat: dotted key to value.
        facts: run.json.
        summary: summary.json.
    """

    name: str
    path: Path
    config: dict[str, Any]
    facts: dict[str, Any]
    summary: dict[str, Any]

    @property
    def arms(self) -> dict[str, dict[str, Any]]:
        """Arm name to its entry of the summary."""
        return self.summary.get("arms", {})


def read(path: Path | str) -> Run:
    """Reads a run directory.

    Raises:
        ValueError: It is no run directory, or the run has no result yet.
    """
    path = Path(path).expanduser().resolve()
    try:
        config = yaml.safe_load((path / "config.yaml").read_text(encoding="utf-8"))
        facts = json.loads((path / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: no run directory ({error})") from None
    if not (path / "summary.json").is_file():
        raise ValueError(f"{path}: the run has no result yet; repeat its command to finish it")
    summary = json.loads((path / "summary.json").read_text(encoding="utf-8"))
    return Run(f"{path.parent.name}/{path.name}", path, flat(config), facts, summary)


def flat(node: Any, prefix: str = "") -> dict[str, Any]:
    """A nested dict as dotted keys; lists are values."""
    if not isinstance(node, Mapping) or not node:
        return {prefix.rstrip("."): node}
    return {k: v for key, value in node.items() for k, v in flat(value, f"{prefix}{key}.").items()}


def differing(runs: list[Run]) -> dict[str, list[Any]]:
    """Config keys whose values are not the same in all runs: key to one value for each run (None: not there)."""
    keys = [key for run in runs for key in run.config if key.partition(".")[0] not in EXEMPT]
    rows = {key: [run.config.get(key) for run in runs] for key in dict.fromkeys(keys)}
    return {key: values for key, values in rows.items() if any(value != values[0] for value in values)}


def incomparable(runs: list[Run]) -> list[str]:
    """A sentence for each reason why the numbers of these runs do not measure the same thing."""
    reasons = []

    def check(what: str, values: list[Any]) -> None:
        if len({json.dumps(value) for value in values}) > 1:
            reasons.append(f"{what} differ: {', '.join(str(value) for value in values)}")

    check("data (fingerprints)", [str(run.facts.get("data", {}).get("fingerprint"))[:12] for run in runs])
    check("models", [[run.config.get("model.name"), run.config.get("model.path")] for run in runs])
    check("evaluation tokens", [next(iter(run.arms.values()), {}).get("tokens") for run in runs])
    check("sequence lengths", [run.config.get("evaluation.seq_len") for run in runs])
    check(
        "kinds of device (fp32 on a CPU, bf16 on a GPU)", ["nvidia" in str(r.facts.get("device")).lower() for r in runs]
    )
    for run in runs:
        if run.facts.get("status") != "finished":
            reasons.append(f"{run.name} is not finished")
        if "export" in run.summary and run.summary["export"]["verified"] is False:
            reasons.append(f"{run.name}: the export is not verified")
        if run.config.get("choices.experiment") == "smoke":
            reasons.append(f"{run.name} is a smoke run: too short to say anything about quality")
    return reasons
