"""Values that depend on the device: `{cpu: a, cuda: b}` in a config is a where no GPU is used and b where one is."""

from collections.abc import Iterator
from typing import Any

from qat.cli.problem import Problem

DEVICE_TYPES = ("cpu", "cuda")


def by_device(config: Any, device_type: str) -> Any:
    """A copy of a config with every `{cpu: a, cuda: b}` replaced by its value for a device type.

    Args:
        config: Nested dicts, lists and scalars; left as it is.
        device_type: `cpu` or `cuda`, as `torch.device(...).type` says it.
    """
    assert device_type in DEVICE_TYPES, device_type
    if isinstance(config, dict):
        if is_choice(config) and len(config) == len(DEVICE_TYPES):
            return by_device(config[device_type], device_type)
        return {key: by_device(value, device_type) for key, value in config.items()}
    if isinstance(config, list):
        return [by_device(value, device_type) for value in config]
    return config


def is_choice(node: Any) -> bool:
    """Whether a node is meant as a choice by device, be it complete or not."""
    return isinstance(node, dict) and bool(node) and set(node) <= set(DEVICE_TYPES)


def check_choices(config: Any, path: str = "") -> Iterator[Problem]:
    """A problem for each choice that names one device type alone."""
    if is_choice(config) and len(config) < len(DEVICE_TYPES):
        value = next(iter(config.values()))
        yield Problem(path, f"names {next(iter(config))} alone; say {{cpu: ..., cuda: ...}}, or {value!r} for both")
    elif isinstance(config, dict):
        for key, value in config.items():
            yield from check_choices(value, f"{path}.{key}" if path else str(key))
