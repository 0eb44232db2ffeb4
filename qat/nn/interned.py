"""Interned values: how an estimator, an observer or a scheme reaches an operator, whose arguments are plain values.

An operator of `torch.library` takes tensors, numbers and strings. A frozen dataclass goes by its name, which spells it
out, and comes back as itself. Whoever passes a name interns the value when it gets it, before anything is compiled.
"""

from typing import Any

_known: dict[str, Any] = {}


def intern(value: object) -> str:
    """The name of a value; equal frozen dataclasses have the same."""
    name = f"{type(value).__module__}.{value!r}"
    _known[name] = value
    return name


def interned(name: str) -> Any:
    """The value of that name."""
    assert name in _known, f"{name} was never interned in this process"
    return _known[name]
