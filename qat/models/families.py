"""Which structure a Hugging Face `model_type` has. The keys are foreign, hence a dictionary."""

from qat.models.gemma import GEMMA
from qat.models.llama import LLAMA
from qat.models.structure import Structure

STRUCTURES: dict[str, Structure] = {"llama": LLAMA, "mistral": LLAMA, "qwen2": LLAMA, "qwen3": LLAMA, "gemma": GEMMA}


def structure_of(model_type: str) -> Structure:
    """The structure of a model family.

    Raises:
        ValueError: The family is not described; RTN and QAT need no description and work all the same.
    """
    if model_type not in STRUCTURES:
        raise ValueError(
            f"model_type {model_type!r} is not described in qat/models: GPTQ, AWQ, SmoothQuant, rotations and "
            f"block-wise training serve {', '.join(STRUCTURES)}; RTN and QAT serve any model"
        )
    return STRUCTURES[model_type]
