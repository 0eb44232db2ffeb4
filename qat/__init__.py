"""Quantization-aware training for LLMs: train, compare with PTQ, export, prove and serve.

The names in `__all__` are imported from where they live when they are first used, so `import qat` itself stays light.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Scheme": "numerics.scheme",
    "IntGrid": "numerics.grid",
    "PerTensor": "numerics.granularity",
    "PerChannel": "numerics.granularity",
    "PerGroup": "numerics.granularity",
    "PerToken": "numerics.granularity",
    "Rule": "numerics.recipe",
    "Recipe": "numerics.recipe",
    "QuantizedTensor": "numerics.qtensor",
    "prepare": "surgery.prepare",
    "convert": "surgery.convert",
    "LLM": "engine.llm",
    "EngineConfig": "engine.config",
    "SamplingParams": "engine.config",
}
__all__ = [*_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qat' has no attribute {name!r}")
    return getattr(importlib.import_module(f"qat.{_HOMES[name]}"), name)
