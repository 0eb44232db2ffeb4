"""Every grid that is not plain integers, and a thousand seeds to round on it."""

import torch

from qat.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from qat.numerics.grid import CODEBOOKS, Codebook, FloatGrid, IntGrid
from qat.numerics.scheme import Scheme

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = 1000

OTHERS = {
    **{f"{g}_{n}": Scheme(Codebook(n), g) for n in CODEBOOKS for g in (PerChannel(), PerGroup(16))},
    "fp8_channel": Scheme(FloatGrid("e4m3"), PerChannel()),
    "fp8_tensor": Scheme(FloatGrid("e4m3"), PerTensor(), scale_dtype="float32"),
    "fp8_token": Scheme(FloatGrid("e4m3"), PerToken(), dynamic=True),
    "int8_token_vllm": Scheme(IntGrid(8), PerToken(), dynamic=True, convention="vllm"),
    "fp4_group": Scheme(FloatGrid("e2m1"), PerGroup(16)),
    "nvfp4": Scheme(FloatGrid("e2m1"), PerGroup(16), scale_dtype="float8_e4m3fn"),
    "mxfp4": Scheme(FloatGrid("e2m1"), PerGroup(32), scale_dtype="float8_e8m0fnu"),
    "mxfp8": Scheme(FloatGrid("e4m3"), PerGroup(32), scale_dtype="float8_e8m0fnu"),
}


def bits(x):
    return x.view({4: torch.int32, 2: torch.int16}[x.element_size()])


def thousand_seeds(rows=4, columns=32, alike=False):
    """A thousand random matrices, stacked, of widely different sizes, some all zero.

    `alike`: all of the same largest element, so that one scale for all of them uses the whole grid in each.
    """
    x = torch.cat([
        torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 10 ** (seed % 9 - 6)
        for seed in range(SEEDS)
    ])  # fmt: skip
    if alike:
        each = x.view(SEEDS, -1)
        return (each / each.abs().amax(1, keepdim=True)).view_as(x)
    x[::97] = 0
    return x
