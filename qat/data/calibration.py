"""Calibration: random windows of the train split, and of nothing else."""

import torch
from torch import Tensor

from qat.data.text import Tokens


def calibration(tokens: Tokens, samples: int, seq_len: int, batch_size: int = 1, seed: int = 0) -> list[Tensor]:
    """Draws windows without replacement, as a pure function of the tokens and the seed.

    Args:
        tokens: Prepared tokens.
        samples: Windows to draw.
        seq_len: Their length.
        batch_size: Windows in a batch; the last batch may be smaller.
        seed: Which draw.

    Returns:
        Batches of token ids, int64 `[<= batch_size, seq_len]`.

    Raises:
        ValueError: The train split has fewer windows than asked for.
    """
    have = len(tokens.streams["train"]) // seq_len
    if samples > have:
        raise ValueError(
            f"calibration.samples={samples}: the train split has {have} windows of {seq_len} tokens; ask for fewer"
        )
    order = torch.randperm(have, generator=torch.Generator().manual_seed(seed))[:samples]
    return list(tokens.windows("train", seq_len)[order].split(batch_size))
