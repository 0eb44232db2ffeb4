"""PackedLinear is F.linear by its tensor, keeps its bytes packed and its scales' dtype."""

import pytest
import torch
import torch.nn.functional as F
from tiny import scattered

from qat.nn.packed_linear import PackedLinear
from qat.nn.quantized_input import QuantizedInput
from qat.numerics.affine import rtn
from qat.numerics.granularity import PerGroup, PerTensor
from qat.numerics.grid import IntGrid
from qat.numerics.qtensor import QuantizedTensor
from qat.numerics.scheme import Scheme


def quantized(rows: int, columns: int, bits: int) -> QuantizedTensor:
    scheme = Scheme(IntGrid(bits), PerGroup(32))
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(bits))
    return QuantizedTensor(*rtn(weight, scheme, torch.bfloat16), scheme, (rows, columns))


@pytest.mark.parametrize("bits", [3, 4])
def test_is_linear_by_the_dequantized_tensor(bits: int) -> None:
    tensor, bias = quantized(48, 64, bits), torch.randn(48)
    x = torch.randn(2, 3, 64)
    expected = F.linear(x, tensor.dequantize(torch.float32), bias)
    layer = PackedLinear(tensor, bias)
    torch.testing.assert_close(layer(x), expected)
    layer.specialize(spare=1 << 20)
    assert float((layer(x) - expected).abs().max()) < 0.05 * float(expected.abs().max())


def test_a_g_idx_reorders_the_input() -> None:
    """The reference and every faster layout serve it; in memory it is what it is in the file."""
    tensor, bias = scattered(quantized(48, 64, 4)), torch.randn(48)
    x = torch.randn(2, 3, 64)
    expected = F.linear(x, tensor.dequantize(torch.float32), bias)
    layer = PackedLinear(tensor, bias)
    torch.testing.assert_close(layer(x), expected)
    assert layer.nbytes * 8 == tensor.bits + 48 * 32
    assert float((PackedLinear(tensor.in_order(), bias)(x) - expected).abs().max()) > 0.1
    input = QuantizedInput(Scheme(IntGrid(8), PerTensor()), torch.tensor([0.05]))
    torch.testing.assert_close(
        PackedLinear(tensor, bias, input)(x), F.linear(input(x), tensor.dequantize(torch.float32), bias)
    )
    layer.specialize(spare=1 << 20)
    assert float((layer(x) - expected).abs().max()) < 0.05 * float(expected.abs().max())
    moved = PackedLinear(tensor).to("meta").order
    assert moved is not None
    assert moved.device.type == "meta"


def test_rounds_its_input_first() -> None:
    input = QuantizedInput(Scheme(IntGrid(8), PerTensor()), torch.tensor([0.05]))
    layer, x = PackedLinear(quantized(48, 64, 4), torch.randn(48), input), torch.randn(2, 3, 64)
    assert torch.equal(layer(x), PackedLinear(quantized(48, 64, 4), layer.bias)(input(x)))
    assert not torch.equal(input(x), x)
    assert layer.nbytes == PackedLinear(quantized(48, 64, 4), layer.bias).nbytes + 4
    assert "input int8_tensor" in repr(layer)
    moved = layer.half().to("meta")
    assert moved.input is not None
    assert moved.input.scale is not None
    assert (moved.input.scale.dtype, moved.input.scale.device.type) == (torch.float32, "meta")


def test_knows_its_bytes_and_holds_no_parameters() -> None:
    tensor = quantized(48, 64, 3)
    layer = PackedLinear(tensor, torch.zeros(48))
    assert layer.nbytes * 8 == tensor.bits + 48 * 32
    assert list(layer.parameters()) == []
    assert "64 -> 48" in repr(layer)


def test_casts_leave_the_scales_alone() -> None:
    layer = PackedLinear(quantized(48, 64, 4)).half().to("cpu")
    assert layer.weight.scale.dtype == torch.bfloat16  # type: ignore[attr-defined]
    on_meta = PackedLinear(quantized(48, 64, 4)).to("meta")
    assert on_meta.weight.words.device.type == "meta"  # type: ignore[attr-defined]


def test_a_cpu_layout_does_not_move() -> None:
    layer = PackedLinear(quantized(64, 64, 4))
    layer.specialize(spare=1 << 20)
    if type(layer.weight).__name__ == "Int4Weight":
        with pytest.raises(ValueError, match="cannot move"):
            layer.to("meta")


def test_refuses_a_bias_that_does_not_fit() -> None:
    with pytest.raises(ValueError, match="bias of shape"):
        PackedLinear(quantized(48, 64, 4), torch.zeros(47))
