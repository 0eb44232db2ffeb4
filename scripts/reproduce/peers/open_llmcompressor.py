"""Opens checkpoints with the transformers and the compressed-tensors that llm-compressor asks for."""

from importlib.metadata import version
from pathlib import Path

import torch
from opening import Tensors, run
from transformers import AutoModelForCausalLM


@torch.no_grad()
def decode(path: Path, dtype: torch.dtype, names: list[str]) -> tuple[Tensors, str]:
    """Weights by module, and the libraries that decoded them."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    model(torch.zeros(1, 1, dtype=torch.int64))  # the library decompresses on the first forward
    modules = {name: model.get_submodule(name) for name in names}
    said = f"transformers {version('transformers')}, compressed-tensors {version('compressed-tensors')}"
    return {name: module.weight.data for name, module in modules.items() if hasattr(module, "weight")}, said


run(decode)
