"""qat ptq: the road of `qat run` with one post-training arm, which is exported."""

from qat.cli.run import main

__all__ = ["main"]
