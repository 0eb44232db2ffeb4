"""qat train: the road of `qat run` with one trained arm."""

from qat.cli.run import main

__all__ = ["main"]
