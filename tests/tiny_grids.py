"""Every grid that is not plain integers, and a thousand seeds to round on it; recipes of such grids."""

from dataclasses import replace

import torch

from qat.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from qat.numerics.grid import CODEBOOKS, Codebook, FloatGrid, IntGrid
from qat.numerics.recipe import Recipe, Rule
from qat.numerics.scheme import Scheme

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SEEDS = 1000

OTHERS = {
    **{f"{g}_{n}": Scheme(Codebook(n), g) for n in CODEBOOKS for g in (PerChannel(), PerGroup(16))},
    "fp8_channel": Scheme(FloatGrid("e4m3"), PerChannel()),
    "fp8_tensor": Scheme(FloatGrid("e4m3"), PerTensor(), scale_dtype="float32"),
    "fp8_token": Scheme(FloatGrid("e4m3"), PerToken(), dynamic=True),
    "int8_token_vllm": Scheme(IntGrid(8), PerToken(), dynamic=True, convention="vllm"),
    "int2_signed": Scheme(IntGrid(2), PerGroup(16), convention="signed"),
    "int4_signed": Scheme(IntGrid(4), PerGroup(16), convention="signed"),
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


def extremes(columns=32):
    """Rows of fp32 from its least number, over subnormal ones, to its largest."""
    x = torch.randn(276, columns, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    x = torch.ldexp(x, torch.arange(-149, 127)[:, None])
    largest = torch.finfo(torch.float32).max * torch.tensor([1.0, 0.9, 0.8, -1.0])[:, None]
    return torch.cat([x, largest.expand(4, columns)])


LM_HEAD = Rule("lm_head", None)
INT8, E4M3, E2M1 = IntGrid(8), FloatGrid("e4m3"), FloatGrid("e2m1")
ROWS = Scheme(INT8, PerChannel())
FP8_ROWS = Scheme(E4M3, PerChannel())
TOKENS = Scheme(INT8, PerToken(), dynamic=True, convention="vllm")
MX8, MX4 = OTHERS["mxfp8"], OTHERS["mxfp4"]
PAIRS = {  # weight and input of every kind of recipe whose activations or levels are not plain
    "w8a8": (ROWS, TOKENS),
    "w8a8_ct": (ROWS, replace(TOKENS, convention="ct")),
    "w8a8_asym": (replace(ROWS, symmetric=False), replace(TOKENS, symmetric=False, convention="ct")),
    "w8a8_static": (ROWS, Scheme(INT8, PerTensor(), symmetric=False)),
    "w8a8_static_sym": (Scheme(INT8, PerTensor()), Scheme(INT8, PerTensor(), scale_dtype="float32")),
    "w8a8_group": (Scheme(INT8, PerGroup(32)), Scheme(INT8, PerGroup(32), dynamic=True)),
    "w4a8": (Scheme(IntGrid(4), PerGroup(32)), TOKENS),
    "w4a8_fp8": (Scheme(IntGrid(4), PerGroup(32)), Scheme(E4M3, PerToken(), dynamic=True)),
    "w2_signed": (Scheme(IntGrid(2), PerGroup(32), convention="signed"), None),
    "fp8": (FP8_ROWS, Scheme(E4M3, PerToken(), dynamic=True)),
    "fp8_static": (FP8_ROWS, Scheme(E4M3, PerTensor())),
    "fp8_tensor": (Scheme(E4M3, PerTensor()), Scheme(E4M3, PerTensor())),
    "fp8_weights": (FP8_ROWS, None),
    "mxfp8": (MX8, replace(MX8, dynamic=True)),
    "mxfp8a16": (MX8, None),
    "mxfp4": (MX4, replace(MX4, dynamic=True)),
    "mxfp4a16": (MX4, None),
    "mxfp4a8": (MX4, replace(MX8, dynamic=True)),
    "nvfp4": (OTHERS["nvfp4"], replace(OTHERS["nvfp4"], dynamic=True)),
    "nvfp4a16": (OTHERS["nvfp4"], None),
}
RECIPES = {name: Recipe({"linears": Rule(".*_proj", *pair), "head": LM_HEAD}) for name, pair in PAIRS.items()}
MIXED = Recipe({  # sub-formats beside each other, and within query, key and value
    "all": Rule(".*_proj", Scheme(IntGrid(4), PerGroup(32))),
    "out": Rule(".*o_proj", *PAIRS["w8a8"]),
    "value": Rule(".*v_proj", *PAIRS["fp8_static"]),
    "mlp": Rule(".*(gate|up)_proj", *PAIRS["nvfp4"]),
    "down": Rule(".*down_proj", *PAIRS["mxfp8"]),
})  # fmt: skip
