"""Scales survive fp16, or are refused."""

import pytest
import torch

from qat.formats.weight_only import from_half, in_half


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_scales_in_half_come_back_or_are_refused(dtype):
    scale = torch.tensor([[1.0, 2.0**-14], [0.125, 3.0]], dtype=dtype)
    assert torch.equal(from_half(in_half("m", scale), dtype), scale)
    assert from_half(in_half("m", scale), dtype).dtype == dtype
    for bad in (0.0, -1.0, torch.inf, torch.nan):
        with pytest.raises(ValueError, match="a scale is zero, negative or not finite"):
            from_half(torch.tensor([1.0, bad], dtype=torch.float16), dtype)
    with pytest.raises(ValueError, match="a scale is zero, negative or not finite"):
        from_half(torch.ones(2, dtype=torch.int16), dtype)
