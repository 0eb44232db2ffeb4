"""A KV cache has one of three schemes; every other one is refused with the field to change."""

import subprocess
import sys

import pytest

from qat.numerics.granularity import PerChannel, PerGroup, PerTensor, PerToken
from qat.numerics.grid import Codebook, FloatGrid, IntGrid
from qat.numerics.kv import KINDS, check_head_dim, head_dim, kind_of, vector_bytes
from qat.numerics.scheme import Scheme

VLLM = {"dynamic": True, "convention": "vllm"}


@pytest.mark.parametrize("kind", ["int8", "int4", "fp8"])
def test_a_kind_is_its_scheme(kind: str) -> None:
    assert kind_of(KINDS[kind]) == kind


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        (Scheme(IntGrid(5), PerToken(), **VLLM), "grid=int5; a KV cache is one of int8, int4, fp8, so use kv=int8"),
        (Scheme(FloatGrid("e2m1"), PerToken(), dynamic=True), "grid=e2m1; a KV cache"),
        (Scheme(Codebook("nf4"), PerToken(), dynamic=True), "grid=nf4; a KV cache"),
        (Scheme(IntGrid(8), PerGroup(32), **VLLM), r"granularity=PerGroup\(group_size=32\).* use granularity=PerToken"),
        (Scheme(IntGrid(8), PerChannel(), **VLLM), "granularity=PerChannel"),
        (Scheme(FloatGrid("e4m3"), PerTensor()), "granularity=PerTensor"),
        (Scheme(IntGrid(4), PerToken(), symmetric=False, dynamic=True), "symmetric=False.* use symmetric=True"),
        (Scheme(IntGrid(4), PerToken(), dynamic=True), "convention=ct.* use convention=vllm"),
        (Scheme(IntGrid(8), PerToken(), scale_dtype="bfloat16", **VLLM), "scale_dtype=bfloat16.* use scale_dtype=None"),
    ],
    ids=str,
)
def test_what_a_cache_cannot_be(scheme: Scheme, words: str) -> None:
    with pytest.raises(ValueError, match=f"^recipe.kv: {words}"):
        kind_of(scheme)


def test_odd_heads() -> None:
    for kind in KINDS:
        check_head_dim(kind, 24)
    check_head_dim("int8", 25)
    check_head_dim("fp8", 25)
    with pytest.raises(ValueError, match=r"recipe.kv: int4 .*head_dim=25 is odd; use kv=int8 or kv=fp8"):
        check_head_dim("int4", 25)


def test_bytes() -> None:
    assert [vector_bytes(kind, 64) for kind in ("int8", "int4", "fp8")] == [68, 36, 68]


def test_head_dim_of_a_config() -> None:
    assert head_dim({"hidden_size": 64, "num_attention_heads": 4}) == 16
    assert head_dim({"hidden_size": 64, "num_attention_heads": 4, "head_dim": None}) == 16
    assert head_dim({"hidden_size": 64, "num_attention_heads": 4, "head_dim": 24}) == 24
    for bad in ({}, {"hidden_size": 64, "num_attention_heads": 0}, {"hidden_size": "64", "num_attention_heads": 4}):
        with pytest.raises(ValueError, match=r"config.json: neither head_dim"):
            head_dim(bad)


def test_needs_no_torch() -> None:
    code = "import sys, qat.numerics.kv; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
