"""Every bad value is refused with its field's name; the module needs no torch."""

import math
import subprocess
import sys
from typing import Any

import pytest

from qat.engine.config import EngineConfig, SamplingParams

BAD_PARAMS = [
    *(("temperature", v) for v in (math.nan, math.inf, -math.inf, -0.1, True, "1", None, 10**400)),
    *(("top_p", v) for v in (0, 0.0, -0.1, 1.01, math.nan, True, "0.9")),
    *(("top_k", v) for v in (0, -2, -5, 1.5, True, None)),
    *(("greedy_tokens", v) for v in (-1, 1.0, True, None)),
    *(("min_p", v) for v in (-0.1, 2, math.nan, False, None)),
    *(("max_tokens", v) for v in (0, -1, 1.0, True, None, "5")),
    *(("seed", v) for v in (2**63, -(2**63) - 1, 1.0, True, "0")),
    *(("stop", v) for v in ("abc", [""], [1], ["ok", ""], None, 5)),
    *(("stop_token_ids", v) for v in ([-1], [1.0], [True], "12", 3, None)),
    *(("logprobs", v) for v in (-1, 21, 1.0, True)),
    *(("ignore_eos", v) for v in (1, None, "yes")),
]
BAD_CONFIGS = [
    *((n, v) for n in ("block_size", "max_num_seqs", "max_num_batched_tokens") for v in (0, -1, 1.0, True, None)),
    *(("num_blocks", v) for v in (0, 1.5, False)),
    *(("max_model_len", v) for v in (1, 0, 2.0)),
    *(("kv_memory_gib", v) for v in (0, -1, math.nan, math.inf, True, "1")),
    *(("device", v) for v in ("gpu", "cuda:", "cuda:x", "1", 0, None)),
    *(("dtype", v) for v in ("int8", "fp32", None)),
    *(("kernel", v) for v in ("fast", "", None)),
    *(("kv", v) for v in ("int5", "fp16", "", None, True)),
]


@pytest.mark.parametrize(("name", "value"), BAD_PARAMS, ids=str)
def test_bad_sampling_params(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        SamplingParams(**{name: value})


@pytest.mark.parametrize(("name", "value"), BAD_CONFIGS, ids=str)
def test_bad_engine_configs(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name):
        EngineConfig(**{name: value})


def test_the_reference_is_fp32_or_wider() -> None:
    with pytest.raises(ValueError, match="dtype='bfloat16': the reference"):
        EngineConfig(kernel="reference", dtype="bfloat16")
    EngineConfig(kernel="reference", dtype="float32", device="cuda:1")
    EngineConfig(kernel="reference", dtype="float64")
    with pytest.raises(ValueError, match="dtype='float64': only the reference kernels"):
        EngineConfig(dtype="float64")


def test_edges_are_valid() -> None:
    SamplingParams(temperature=0, top_k=1, top_p=1, min_p=1, seed=-(2**63), logprobs=20, max_tokens=1)
    SamplingParams(
        temperature=5e-324, top_p=5e-324, min_p=0, seed=2**63 - 1, logprobs=0, stop=("a",), stop_token_ids=(0,)
    )


def test_what_only_the_vocabulary_can_refuse() -> None:
    SamplingParams(stop_token_ids=[9], logprobs=10).check(10)
    with pytest.raises(ValueError, match="stop_token_ids: 10 is outside the vocabulary of 10"):
        SamplingParams(stop_token_ids=[3, 10]).check(10)
    with pytest.raises(ValueError, match="logprobs=11"):
        SamplingParams(logprobs=11).check(10)


def test_needs_no_torch() -> None:
    code = "import sys, qat.engine.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
