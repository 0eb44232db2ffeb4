"""Opens checkpoints with GPTQModel."""

from importlib.metadata import version
from pathlib import Path

import torch
from gptqmodel_weights import decoded
from opening import Tensors, run


def decode(path: Path, dtype: torch.dtype, _: list[str]) -> tuple[Tensors, str]:
    """Weights by module, and the class that decoded them."""
    weights, model = decoded(path, dtype)
    kernels = {type(model.get_submodule(name)).__name__ for name in weights}
    return weights, f"gptqmodel {version('gptqmodel')} {' '.join(sorted(kernels))}"


run(decode)
