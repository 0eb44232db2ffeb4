"""Scales survive fp16, or are refused."""

from dataclasses import replace

import pytest
import torch
from tiny import recipe, scattered, tiny

from qat.engine.loader import FORMATS
from qat.formats.weight_only import convention_of, from_half, in_half, meta
from qat.nn.observers.minmax import MinMax
from qat.ptq.rtn import rtn


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_in_half_come_back_or_are_refused(dtype):
    scale = torch.tensor([[1.0, 2.0**-14], [0.125, 3.0]], dtype=dtype)
    assert torch.equal(from_half(in_half("m", scale), dtype), scale)
    assert from_half(in_half("m", scale), dtype).dtype == dtype
    assert torch.equal(from_half(in_half("m", -scale), dtype), -scale)
    for bad in (0.0, -0.0, torch.inf, torch.nan):
        with pytest.raises(ValueError, match="a scale is zero or not finite"):
            from_half(torch.tensor([1.0, bad], dtype=torch.float16), dtype)
    with pytest.raises(ValueError, match="a scale is zero or not finite"):
        from_half(torch.ones(2, dtype=torch.int16), dtype)


def test_a_file_says_that_all_scales_have_signs_and_else_they_have_none(tmp_path):
    signed = rtn(tiny(1), recipe(), [], observer=MinMax()).tensors
    asymmetric = rtn(tiny(1), recipe(symmetric=False), [], observer=MinMax()).tensors
    name = next(iter(signed))
    plain = replace(signed[name], scheme=replace(signed[name].scheme, convention="ct"))
    for tensors, found in ((signed, "signed"), (asymmetric, "ct"), (signed | {name: plain}, "ct")):
        assert convention_of(tmp_path, {"meta": meta(torch.bfloat16, tensors)}) == found
    with pytest.raises(ValueError, match="scale_convention 'vllm'; expected ct or signed"):
        convention_of(tmp_path, {"meta": {"scale_convention": "vllm"}})


@pytest.mark.parametrize("name", ["awq", "gguf"])
def test_a_g_idx_is_refused_by_module_and_fix(name):
    tensors = rtn(tiny(), recipe(), [], observer=MinMax()).tensors
    name_of_one = "model.layers.1.mlp.up_proj"
    tensors[name_of_one] = scattered(tensors[name_of_one])
    with pytest.raises(ValueError, match=rf"^{name_of_one}: .* g_idx, which {name} cannot carry\. Use format=gptq or"):
        FORMATS[name].expressed(recipe(), tensors)
