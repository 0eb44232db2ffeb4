"""Quantization-aware training for LLMs: train, compare with the strongest PTQ, export, prove and serve."""

__version__ = "0.1.0"
