"""What GPTQModel makes of a checkpoint of its own formats: every linear, decoded by the tool itself."""

import os
from pathlib import Path

import torch

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "4")  # on two cores `load` raises without it

from gptqmodel import BACKEND, GPTQModel
from gptqmodel.nn_modules.qlinear import BaseQuantLinear


@torch.no_grad()
def decoded(path: Path, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], torch.nn.Module]:
    """Module name to its weight `[out, in]` in the tool's own arithmetic of a 16-bit dtype, and the loaded model."""
    model = GPTQModel.load(str(path), backend=BACKEND.TORCH, device="cpu", dtype=dtype).model
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseQuantLinear):
            found[name] = module.dequantize_weight().T.contiguous()
    return found, model
