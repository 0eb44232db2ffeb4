"""W&B, for a whole run: offline unless a key is there or online is asked for. Nothing else in a run depends on it."""

import logging
import os
from pathlib import Path
from typing import Any


def open_run(config: dict[str, Any], directory: Path, id: str) -> Any | None:
    """A W&B run, or None where `logger.wandb` is null.

    Args:
        config: The resolved config, logged as nested plain dicts.
        directory: The run directory; W&B's own files lie in it.
        id: W&B's id of the run: the same again if the run is resumed.
    """
    settings = (config.get("logger") or {}).get("wandb")
    if not settings:
        return None
    import wandb

    mode = settings["mode"]
    if mode == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if has_key() else "offline")
    logging.getLogger("wandb").setLevel(logging.ERROR)
    recipe, model = config["choices"].get("recipe"), config["model"]["name"]
    return wandb.init(
        project=settings["project"],
        entity=settings["entity"],
        group=f"{model}/{config['choices'].get('data')}/{config['choices'].get('experiment') or config['verb']}",
        job_type=config["verb"],
        name=f"{recipe}-s{config['seed']}",
        tags=[str(recipe), config["verb"], *settings["tags"]],
        config=config,
        dir=directory,
        id=id,
        mode=mode,
        resume="allow" if mode == "online" else None,
        settings=wandb.Settings(silent=True, console="off"),
    )


def has_key() -> bool:
    """Whether W&B could log in without asking."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    import netrc

    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def close(run: Any | None, summary: dict[str, Any]) -> None:
    """Writes what people sort runs by, and ends the W&B run."""
    if run is None:
        return
    for arm, values in summary.get("arms", {}).items():
        numbers = {k: v for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)}
        run.summary.update({f"{name}/{arm}": value for name, value in numbers.items()})
    for versus, values in summary.get("recovered", {}).items():
        if versus != "vs_best_ptq":
            run.summary.update({f"recovered/{versus}/{k}": v for k, v in values.items()})
    if "export" in summary:
        run.summary.update({"export/verified": summary["export"]["verified"]})
    run.finish()
