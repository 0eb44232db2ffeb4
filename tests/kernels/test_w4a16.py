"""Law (d): the reference is F.linear by the dequantized tensor, for every width, granularity and ragged shape."""

import pytest
import torch
import torch.nn.functional as F
from tiny_grids import OTHERS

from qat.kernels import w4a16
from qat.kernels.w4a16 import PackedWeight, linear, linear_by_tiles, linear_reference, pack_weight, specialize
from qat.numerics.affine import divisor, rtn
from qat.numerics.granularity import Granularity, PerChannel, PerGroup, PerTensor
from qat.numerics.grid import IntGrid
from qat.numerics.packing import pack
from qat.numerics.qtensor import QuantizedTensor
from qat.numerics.scheme import Scheme

GRANULARITIES = [PerGroup(32), PerGroup(12), PerChannel(), PerTensor()]


def quantized(
    rows: int, columns: int, bits: int, granularity: Granularity, symmetric: bool, scale: torch.dtype = torch.bfloat16
) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(rows + columns + bits)
    scheme = Scheme(IntGrid(bits), granularity, symmetric, convention="signed")
    weight = torch.randn(rows, columns, generator=generator) + 0.1
    return QuantizedTensor(*rtn(weight, scheme, scale), scheme, (rows, columns))


def tokens(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("granularity", GRANULARITIES, ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
def test_reference_is_linear_by_the_dequantized_tensor(bits: int, granularity: Granularity, symmetric: bool) -> None:
    tensor = quantized(37, 96, bits, granularity, symmetric)
    weight = pack_weight(tensor)
    assert torch.equal(weight.words, pack(tensor.codes.to(torch.int16) + 2 ** (bits - 1), bits))
    assert weight.scale.dtype == torch.bfloat16
    for dtype in (torch.float32, torch.bfloat16):
        assert torch.equal(weight.rows(0, 37, dtype), tensor.dequantize(dtype))
        ids = torch.tensor([36, 0, 5, 5])
        assert torch.equal(weight.lookup(ids, dtype), tensor.dequantize(dtype)[ids])
    x, bias = tokens(5, 96), tokens(37)
    assert torch.equal(linear_reference(x, weight), F.linear(x, tensor.dequantize(torch.float32)))
    torch.testing.assert_close(linear_reference(x, weight, bias), F.linear(x, tensor.dequantize(torch.float32), bias))


@pytest.mark.parametrize("name", [name for name, scheme in OTHERS.items() if not scheme.dynamic])
def test_so_it_is_on_every_other_grid(name: str) -> None:
    """FP8, FP4 and codebooks: codes are packed as they are, block scales stay as they are stored."""
    scheme, x, w = OTHERS[name], tokens(5, 96), tokens(37, 96)
    g = divisor((w,), scheme)
    tensor = QuantizedTensor(*rtn(w, scheme, torch.bfloat16, g), scheme, (37, 96), g)
    weight = pack_weight(tensor)
    assert weight.nbytes * 8 == tensor.bits + 37 * (weight.words.shape[1] * 32 - 96 * scheme.grid.bits)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        assert torch.equal(weight.rows(3, 36, dtype), tensor.dequantize(dtype)[3:36])
    assert torch.equal(linear_reference(x, weight), F.linear(x, tensor.dequantize(torch.float32)))
    assert torch.equal(weight.to("cpu").rows(0, 37, torch.float32), tensor.dequantize(torch.float32))
    assert specialize(weight, spare=1 << 30) is weight, "twins know integers only"


@pytest.mark.parametrize("step", [1, 5, 36, 37])
def test_tiles_change_nothing(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = quantized(37, 96, 4, PerGroup(32), symmetric=False)
    weight = pack_weight(tensor)
    monkeypatch.setattr(w4a16, "TILE_CPU", step * 96)
    seen = []

    def rows(start: int, stop: int) -> torch.Tensor:
        seen.append(stop - start)
        return weight.rows(start, stop, torch.float32)

    x = tokens(2, 3, 96)
    y = linear_by_tiles(x, weight.shape, rows)
    torch.testing.assert_close(y, F.linear(x, tensor.dequantize(torch.float32)))
    assert max(seen) == step
    assert sum(seen) == 37


def test_x_decides_the_dtype() -> None:
    tensor = quantized(32, 64, 4, PerGroup(32), symmetric=True)
    x = tokens(3, 64).bfloat16()
    assert torch.equal(linear(x, pack_weight(tensor)), F.linear(x, tensor.dequantize(torch.bfloat16)))
    assert linear_reference(x, pack_weight(tensor)).dtype == torch.float32


def test_bytes_are_the_bits_of_the_tensor() -> None:
    tensor = quantized(64, 128, 3, PerGroup(64), symmetric=True)
    assert pack_weight(tensor).nbytes * 8 == tensor.bits


def test_refuses_what_it_does_not_carry() -> None:
    tensor = quantized(8, 32, 4, PerGroup(32), symmetric=True)
    reordered = QuantizedTensor(**{**vars(tensor), "g_idx": torch.zeros(32, dtype=torch.int32)})
    with pytest.raises(ValueError, match="g_idx"):
        pack_weight(reordered)


def test_widths_without_a_kernel_keep_their_words() -> None:
    weight = pack_weight(quantized(64, 128, 3, PerGroup(64), symmetric=True))
    assert specialize(weight, spare=1 << 30) is weight
    assert isinstance(weight, PackedWeight)


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_same_on_cuda(bits: int) -> None:
    tensor = quantized(100, 96, bits, PerGroup(32), symmetric=False).to("cuda")
    weight = pack_weight(tensor)
    assert torch.equal(weight.rows(0, 100, torch.float32), tensor.dequantize(torch.float32))
    x = tokens(7, 96).cuda()
    torch.testing.assert_close(linear(x, weight), F.linear(x, tensor.dequantize(torch.float32)))
    assert specialize(weight, spare=1 << 30) is weight
