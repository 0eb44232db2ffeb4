"""ModelRunner: a batch of chunks through the model. Owns the cache; knows nothing of requests beyond their tokens."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain

import numpy as np
import torch
from torch import Tensor

from qat.engine.config import EngineConfig
from qat.engine.loader import Loaded
from qat.engine.scheduler import Chunk
from qat.kernels.kv_store import PagedVectors
from qat.kernels.paged_attention import Paging
from qat.numerics.kv import vector_bytes


class ModelRunner:
    """Runs the model over a paged cache that it allocates.

    Args:
        loaded: Model and configuration.
        config: Size of the pool; `kernel="reference"` also keeps reduced-precision fp32 (TF32) off.

    Raises:
        ValueError: The memory for the pool holds no block.
    """

    def __init__(self, loaded: Loaded, config: EngineConfig):
        self.model = loaded.model
        self.device, self.block_size = loaded.model.device, config.block_size
        self._exact = config.kernel == "reference"
        self.num_blocks = num_blocks(loaded, config)
        described, dtype = loaded.config, loaded.model.dtype
        shape = (self.num_blocks, described.num_key_value_heads, config.block_size, described.head_dim)
        cache = partial(PagedVectors.empty, shape, loaded.kv, dtype, self.device)
        self.caches = [(cache(), cache()) for _ in range(described.num_hidden_layers)]

    @torch.inference_mode()
    def forward(self, chunks: Sequence[Chunk]) -> Tensor:
        """Computes chunks, whose blocks are allocated: hidden states `[tokens, N]`, in the chunks' order."""
        stops = np.array([c.stop for c in chunks])
        lengths = stops - np.array([c.start for c in chunks])
        rows = np.repeat(np.arange(len(chunks)), lengths)  # of each token: its chunk, its position, its slot
        positions = np.arange(len(rows)) + np.repeat(stops - lengths.cumsum(), lengths)
        tables, size = block_tables([c.sequence.block_table for c in chunks]), self.block_size
        slots = tables[rows, positions // size] * size + positions % size
        tokens = list(chain.from_iterable(c.sequence.tokens(c.start, c.stop) for c in chunks))
        ids, places, written = self._tensor(np.stack([np.array(tokens), positions, slots]))
        shape = self.caches[0][0].data.shape
        paging = Paging(written, self._tensor(tables), lengths.tolist(), stops.tolist(), shape)
        with self._precision():
            return self.model(ids, places, paging, self.caches)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """fp32 logits `[n, V]` of hidden states `[n, N]`."""
        with self._precision():
            return self.model.logits(hidden)

    def _tensor(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self.device)

    @contextmanager
    def _precision(self) -> Iterator[None]:
        """On the reference path, fp32 products in fp32, whatever the process allows otherwise."""
        before = torch.get_float32_matmul_precision()
        if self._exact and before != "highest":
            torch.set_float32_matmul_precision("highest")
            try:
                yield
            finally:
                torch.set_float32_matmul_precision(before)
        else:
            yield


def block_tables(tables: Sequence[Sequence[int]]) -> np.ndarray:
    """Tables of different lengths as one array, int64 `[n, longest]`, filled up with 0."""
    lengths = np.array([len(table) for table in tables])
    padded = np.zeros((len(tables), lengths.max()), dtype=np.int64)
    padded[np.arange(padded.shape[1]) < lengths[:, None]] = list(chain.from_iterable(tables))
    return padded


def num_blocks(loaded: Loaded, config: EngineConfig) -> int:
    """Blocks of the pool: as configured, or as many as the memory for it holds and the sequences could use.

    Raises:
        ValueError: Not even one.
    """
    if config.num_blocks is not None:
        return config.num_blocks
    described = loaded.config
    vectors = 2 * described.num_hidden_layers * described.num_key_value_heads * config.block_size
    size = described.head_dim * loaded.model.dtype.itemsize
    block_bytes = vectors * (size if loaded.kv is None else vector_bytes(loaded.kv, described.head_dim))
    held = int(config.kv_memory_gib * 2**30) // block_bytes
    if held < 1:
        raise ValueError(
            f"kv_memory_gib={config.kv_memory_gib}: one block of {config.block_size} tokens takes "
            f"{block_bytes / 2**30:.6f} GiB in this model; give the pool more, or make block_size smaller"
        )
    return min(held, config.max_num_seqs * -(-loaded.max_model_len // config.block_size))
