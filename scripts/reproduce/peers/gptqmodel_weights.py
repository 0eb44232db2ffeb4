"""What GPTQModel makes of a checkpoint of GPTQ's or AWQ's layout: every linear, decoded by the tool itself."""

import os
from pathlib import Path

import torch

os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "4")  # on two cores `load` raises without it

from gptqmodel import BACKEND, GPTQModel
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear


@torch.no_grad()
def decoded(path: Path, dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], torch.nn.Module]:
    """Module name to its weight `[out, in]` in the tool's own arithmetic of a 16-bit dtype, and the loaded model."""
    model = GPTQModel.load(str(path), backend=BACKEND.TORCH, device="cpu", dtype=dtype).model
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, AwqTorchLinear):  # it inherits GPTQ's decoding and does not use it: its forward says
            found[name] = module(torch.eye(module.in_features, dtype=dtype)).T.contiguous()
        elif isinstance(module, BaseQuantLinear):
            found[name] = module.dequantize_weight().T.contiguous()
    return found, model
