"""Changes: what was done to some modules, in memory and as a file."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qat.numerics.qtensor import QuantizedTensor
from qat.numerics.recipe import Recipe

Row = dict[str, Any]
PARTS = ("codes", "scale", "zero_point", "global_scale", "g_idx")


@dataclass
class Changes:
    """What was done to some modules.

    Attributes:
        tensors: Module name to quantized weight.
        folded: Parameter name to changed unquantized tensor, in the storage dtype.
        layers: One row for each module, for reports: name, loss, fallback, seconds, ...
        state: Entries of a prepared model's state dict from which training can go on (fp32 masters, learned scales), on
            the CPU; empty for methods that train nothing.
    """

    tensors: dict[str, QuantizedTensor] = field(default_factory=dict)
    folded: dict[str, Tensor] = field(default_factory=dict)
    layers: list[Row] = field(default_factory=list)
    state: dict[str, Tensor] = field(default_factory=dict)

    def add(self, other: "Changes") -> None:
        """Takes over what another holds."""
        self.tensors |= other.tensors
        self.folded |= other.folded
        self.layers += other.layers
        self.state |= other.state

    def to(self, device: torch.device) -> "Changes":
        """The same on another device; `state` stays."""
        tensors = {name: tensor.to(device) for name, tensor in self.tensors.items()}
        folded = {name: value.to(device) for name, value in self.folded.items()}
        return Changes(tensors, folded, self.layers, self.state)

    def save(self, file: Path) -> None:
        """Writes a safetensors file, whole or not at all."""
        parts = {f"folded/{name}": value for name, value in self.folded.items()}
        parts |= {f"state/{name}": value for name, value in self.state.items()}
        for name, tensor in self.tensors.items():
            values = {part: getattr(tensor, part) for part in PARTS}
            parts |= {f"{part}/{name}": value for part, value in values.items() if value is not None}
        write(file, parts, {"layers": json.dumps(self.layers)})

    @staticmethod
    def load(file: Path, recipe: Recipe, device: Any) -> "Changes":
        """What `save` wrote.

        Args:
            file: The file.
            recipe: Schemes of the quantized weights.
            device: Where tensors go, those of `state` excepted.
        """
        parts = load_file(file)
        with safe_open(file, framework="pt") as handle:
            layers = json.loads(handle.metadata()["layers"])
        tensors = {}
        for name, codes in _section(parts, "codes").items():
            hit = recipe.rule_for(name)
            assert hit is not None
            assert hit[1].weight is not None
            found = {p: parts[f"{p}/{name}"].to(device) for p in PARTS if f"{p}/{name}" in parts}
            values: dict[str, Any] = {"zero_point": None} | found
            tensors[name] = QuantizedTensor(**values, scheme=hit[1].weight, shape=tuple(codes.shape))
        folded = {name: value.to(device) for name, value in _section(parts, "folded").items()}
        return Changes(tensors, folded, layers, _section(parts, "state"))


def write(file: Path, parts: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes a safetensors file beside its place, then renames it: a kill leaves the old one or the new one."""
    part = file.with_name(".part")
    save_file({name: value.contiguous() for name, value in parts.items()}, part, metadata)
    part.replace(file)


def _section(parts: dict[str, Tensor], section: str) -> dict[str, Tensor]:
    return {k.removeprefix(f"{section}/"): v for k, v in sorted(parts.items()) if k.startswith(f"{section}/")}
