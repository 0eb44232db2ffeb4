"""Training batches: batch k is a pure function of (seed, k), so a resumed run sees what an unbroken one would."""

import hashlib
from collections.abc import Iterator

import pytorch_lightning as pl
import torch
from torch import Tensor

from qat.data.text import Tokens


class Batches:
    """Endless batches of windows, each epoch in a new order; `start` is the first batch that an iteration yields."""

    def __init__(self, windows: Tensor, batch_size: int, seed: int, start: int = 0):
        self.windows, self.batch_size, self.seed, self.start = windows, batch_size, seed, start

    def batch(self, k: int) -> Tensor:
        """Token ids of batch k, int64 `[batch_size, seq_len]`."""
        return torch.stack([self.windows[self._index(k * self.batch_size + i)] for i in range(self.batch_size)])

    def _index(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.windows))
        if getattr(self, "_epoch", None) != epoch:
            generator = torch.Generator().manual_seed(_seed(self.seed, epoch))
            self._epoch, self._order = epoch, torch.randperm(len(self.windows), generator=generator)
        return int(self._order[offset])

    def __iter__(self) -> Iterator[Tensor]:
        k = self.start
        while True:
            yield self.batch(k)
            k += 1


def _seed(seed: int, epoch: int) -> int:
    """Seed of an epoch's order: of both, hashed, or the epochs of one seed would be those of the next, shifted."""
    if epoch == 0:
        return seed
    return int.from_bytes(hashlib.sha256(f"{seed} {epoch}".encode()).digest()[:8], "big", signed=True)


class Windows:
    """Windows in order, some at a time. Not a DataLoader: that draws from the global random state."""

    def __init__(self, windows: Tensor, batch_size: int):
        self.batches = windows.split(batch_size)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches)


class TokenData(pl.LightningDataModule):
    """Windows of prepared tokens.

    Args:
        tokens: Prepared tokens.
        seq_len: Length of a window.
        batch_size: Windows in a micro-batch.
        accumulate: Micro-batches for each optimizer step.
        val_windows: Windows of the validation split; fewer if it has fewer.
        seed: Order of the training windows.
    """

    def __init__(
        self, tokens: Tokens, seq_len: int, batch_size: int, accumulate: int = 1, val_windows: int = 4, seed: int = 0
    ):
        super().__init__()
        self.train = tokens.windows("train", seq_len)
        have = len(tokens.streams["validation"]) // seq_len
        self.validation = tokens.windows("validation", seq_len, min(val_windows, have)) if have else None
        self.batch_size, self.accumulate, self.seed = batch_size, accumulate, seed

    def train_dataloader(self) -> Batches:
        """Batches from the one that the next optimizer step needs: 0, or where a checkpoint left off."""
        assert self.trainer is not None
        start = self.trainer.global_step * self.accumulate
        rank, world = self.trainer.global_rank, self.trainer.world_size
        return Batches(self.train[rank::world], self.batch_size, self.seed, start)

    def transfer_batch_to_device(self, batch: Tensor, device: torch.device, dataloader_idx: int) -> Tensor:
        """To a GPU from pinned memory: from other memory the host would wait until the GPU has caught up."""
        return batch.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else batch.to(device)

    def val_dataloader(self) -> Windows | list[Windows]:
        """Validation windows; none if the split has none."""
        return [] if self.validation is None else Windows(self.validation, self.batch_size)
