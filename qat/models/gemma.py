"""Gemma, the first: Llama's block, but norms multiply by `1 + weight`. Later ones have norms on the branches, too."""

from dataclasses import replace

from qat.models.llama import LLAMA

GEMMA = replace(LLAMA, offset=1.0)
