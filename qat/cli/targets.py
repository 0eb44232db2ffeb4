"""`_target_` nodes: allowed, existing, and called with arguments that they take. Nothing is imported."""

from collections.abc import Iterator
from typing import Any

from qat.cli.kinds import is_open, mismatches
from qat.cli.problem import Problem, did_you_mean
from qat.cli.signatures import Signature, signature

ALLOWED = ("qat.", "torch.optim.", "pytorch_lightning.")
WORDS = ("_target_", "_partial_", "_convert_", "_recursive_")  # Hydra's, on every node that has a target
LIGHTNING = "trainer.lightning"  # keyword arguments of Lightning's Trainer
OURS = {  # arguments of the Trainer that training gives itself, and the key that decides them
    "accelerator": "device",
    "devices": "device",
    "max_steps": "trainer.max_steps",
    "max_epochs": "trainer.max_steps",
    "accumulate_grad_batches": "trainer.accumulate",
    "gradient_clip_val": "trainer.clip",
    "precision": "trainer.precision",
    "val_check_interval": "trainer.val_every",
    "check_val_every_n_epoch": "trainer.val_every",
    "logger": "logger",
    "callbacks": "callbacks",
    "num_sanity_val_steps": "the training loop",
    "plugins": "the training loop",
    "log_every_n_steps": "trainer.log_every",
    "enable_progress_bar": "the training loop",
    "enable_model_summary": "the training loop",
    "use_distributed_sampler": "the training loop",
}


def check_targets(config: dict[str, Any]) -> Iterator[Problem]:
    """Every `_target_` node of a config whose choices by device are made, and the Trainer's keyword arguments."""
    yield from _walk(config, "")
    trainer = config.get("trainer")
    arguments = trainer.get("lightning") if isinstance(trainer, dict) else None
    if isinstance(arguments, dict) and arguments:
        for key in sorted(set(arguments) & set(OURS)):
            yield Problem(f"{LIGHTNING}.{key}", f"is decided by {OURS[key]}")
        arguments = {key: value for key, value in arguments.items() if key not in OURS}
        found = signature("pytorch_lightning.Trainer")
        left = {name: parameter for name, parameter in found.parameters.items() if name not in OURS}
        yield from bind(LIGHTNING, Signature(left, found.any_keyword), arguments, partial=True)


def _walk(node: Any, path: str) -> Iterator[Problem]:
    if isinstance(node, dict):
        if "_target_" in node:
            yield from check_target(path, node)
        for key, value in node.items():
            yield from _walk(value, f"{path}.{key}".lstrip("."))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _walk(value, f"{path}[{index}]")


def check_target(path: str, node: dict[str, Any]) -> Iterator[Problem]:
    """One `_target_` node, not the ones inside it."""
    target = node["_target_"]
    if is_open(target):
        return
    if refusal := refused(path, target):
        yield Problem(f"{path}._target_", refusal)
        return
    try:
        found = signature(target)
    except LookupError as error:
        yield Problem(f"{path}._target_", f"{target} does not exist: {error}")
        return
    for word in sorted(key for key in node if key.startswith("_") and key not in WORDS):
        near = "; arguments are given by name" if word == "_args_" else did_you_mean(word, WORDS)
        yield Problem(f"{path}.{word}", f"not used here{near}")
    for word in ("_partial_", "_recursive_"):
        if not isinstance(node.get(word, True), bool):
            yield Problem(f"{path}.{word}", "expected true or false")
    arguments = {key: value for key, value in node.items() if not key.startswith("_")}
    yield from bind(path, found, arguments, partial=node.get("_partial_") is True)


def refused(path: str, target: Any) -> str | None:
    """Why a target is not allowed at its place, or None."""
    if not isinstance(target, str) or not all(word.isidentifier() for word in target.split(".")) or "." not in target:
        return f"expected a dotted name as in package.module.Class, found {target!r}"
    if path.split(".")[0] == "callbacks" or target.startswith(ALLOWED):
        return None
    return f"{target} is not allowed; a target starts with {', '.join(ALLOWED[:-1])} or {ALLOWED[-1]}"


def bind(path: str, found: Signature, arguments: dict[str, Any], partial: bool) -> Iterator[Problem]:
    """Arguments held against a signature: unknown, missing, of the wrong kind."""
    for key, value in arguments.items():
        where = f"{path}.{key}"
        parameter = found.parameters.get(key)
        if parameter is None:
            if not found.any_keyword:
                near, names = did_you_mean(key, found.parameters), ", ".join(found.parameters) or "none"
                yield Problem(where, f"no such argument{near or f' (there are: {names})'}")
        elif parameter.annotation is not None:
            yield from (Problem(*found) for found in mismatches(parameter.annotation, value, where))
    if not partial:
        for name in found.parameters:
            if found.parameters[name].required and name not in arguments:
                yield Problem(f"{path}.{name}", f"has no value; give it: {path}.{name}=...")
