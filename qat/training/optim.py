"""The optimizer: what trains, fp32 masters, scales in a group of their own, warm-up and cosine."""

import math
from dataclasses import dataclass
from typing import Literal, get_args

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from qat.nn.fake_quantize import FakeQuantize
from qat.nn.frozen_codes import Follow, freeze_codes

Train = Literal["all", "scales"]


@dataclass(frozen=True)
class Optim:
    """AdamW (arXiv:1711.05101) with linear warm-up and cosine decay, stepped once for each optimizer step.

    Attributes:
        lr: Peak learning rate of weights, adapters, norms and biases.
        scale_lr: Peak learning rate of the logarithms of scales: one step moves a scale by about this fraction.
        betas: AdamW's.
        weight_decay: Of weight matrices; never of norms, biases or scales.
        warmup: Fraction of the steps.
        final: The cosine ends at this fraction of the peak.
        train_embeddings: Whether the tables of embeddings, and heads tied to them, train; scales of quantized ones do
            in any case.
        train: `all`; or `scales`: codes, norms and all else stay as they are (E2E-QP of arXiv:2407.11062).

    Raises:
        ValueError: A value is out of its range.
    """

    lr: float = 1e-4
    scale_lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    warmup: float = 0.1
    final: float = 0.0
    train_embeddings: bool = False
    train: Train = "all"

    def __post_init__(self) -> None:
        for name in ("lr", "scale_lr", "weight_decay"):
            if not (getattr(self, name) >= 0 and math.isfinite(getattr(self, name))):
                raise ValueError(f"optim.{name}={getattr(self, name)}: a finite number, 0 or larger")
        for name in ("warmup", "final"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"optim.{name}={getattr(self, name)}: a fraction between 0 and 1")
        if self.train not in get_args(Train):
            raise ValueError(f"optim.train={self.train}: one of {', '.join(get_args(Train))}")

    def select(self, model: nn.Module) -> None:
        """Leaves a prepared model, in place, with a gradient only for what trains."""
        if self.train == "scales":
            freeze_codes(model)

    def factor(self, step: int, steps: int) -> float:
        """What optimizer step `step` (from 0) of `steps` multiplies the peak learning rates by."""
        warm = max(round(self.warmup * steps), 1)
        cosine = 0.5 * (1 + math.cos(math.pi * min(step / max(steps, 1), 1)))
        return min((step + 1) / warm, 1) * (self.final + (1 - self.final) * cosine)

    def build(self, model: nn.Module, steps: int) -> tuple[Optimizer, LambdaLR]:
        """Optimizer and schedule over the trainable parameters of a prepared model, after `select`."""
        scales = {id(p) for m in model.modules() if isinstance(m, FakeQuantize) for p in m.parameters()}
        trainable = [p for p in model.parameters() if p.requires_grad]
        matrices = [p for p in trainable if id(p) not in scales and p.dim() >= 2]
        vectors = [p for p in trainable if id(p) not in scales and p.dim() < 2]
        groups = [
            {"name": "weights", "params": matrices, "lr": self.lr, "weight_decay": self.weight_decay},
            {"name": "vectors", "params": vectors, "lr": self.lr, "weight_decay": 0.0},
            {
                "name": "scales",
                "params": [p for p in trainable if id(p) in scales],
                "lr": self.scale_lr,
                "weight_decay": 0.0,
            },
        ]
        optimizer = AdamW([g for g in groups if g["params"]], betas=(self.betas[0], self.betas[1]), fused=True)
        if self.train == "scales":
            optimizer.register_step_post_hook(Follow(model))
        return optimizer, LambdaLR(optimizer, lambda step: self.factor(step, steps))
