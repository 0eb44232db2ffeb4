"""Attention over whole windows: causal, with no mask to build.

Training and judging run windows of one length, without padding and without packing, and for these causality is all that
a mask says. transformers finds that out anew in every forward by asking the device (`find_packed_sequence_indices`): a
GPU's host waits there, a CUDA graph cannot be captured, and under `torch.compile` a dense mask is built, with which
the fast attention kernels cannot run. Here the caller says it instead.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from qat.nn.kv import BASE, PREFIX
from qat.numerics.kv import KINDS

WINDOWS = "qat_windows_"
KNOWN = (BASE, *(PREFIX + kind for kind in KINDS))


@contextmanager
def whole_windows(model: PreTrainedModel) -> Iterator[None]:
    """While open, the model's forward is given whole windows, and nothing else.

    Attention that computes by another function than `sdpa` or a quantized cache's is left to itself. Where a model
    looks back no further than a number of positions that is smaller than the window, it still gets its mask.
    """
    name = model.config._attn_implementation
    if name not in KNOWN:
        yield
        return
    model.config._attn_implementation = WINDOWS + name
    try:
        yield
    finally:
        model.config._attn_implementation = name


def _mask(
    q_length: int,
    kv_length: int,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor | None:
    """None, which is causal, where that is the whole mask; `use_vmap` tells of a mask that the model adds to it."""
    near = local_size is None or kv_length < local_size
    if attention_mask is None and q_length == kv_length and near and not use_vmap:
        return None
    kwargs |= {"attention_mask": attention_mask, "local_size": local_size, "use_vmap": use_vmap}
    return sdpa_mask(q_length=q_length, kv_length=kv_length, **kwargs)


for _name in KNOWN:
    AttentionInterface.register(WINDOWS + _name, ALL_ATTENTION_FUNCTIONS[_name])
    AttentionMaskInterface.register(WINDOWS + _name, _mask)
