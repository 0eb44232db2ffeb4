"""PackedEmbedding: rows of the dequantized table, from the one weight that a tied head multiplies by."""

import pytest
import torch
from tiny import scattered

from qat.kernels.w4a16 import PackedWeight, Table
from qat.nn.packed_embedding import PackedEmbedding
from qat.nn.packed_linear import PackedLinear
from qat.numerics.affine import rtn
from qat.numerics.granularity import Granularity, PerChannel, PerGroup, PerTensor
from qat.numerics.grid import IntGrid
from qat.numerics.qtensor import QuantizedTensor
from qat.numerics.scheme import Scheme

IDS = torch.tensor([63, 0, 7, 7])
SPARE = 1 << 20


def quantized(bits: int, granularity: Granularity, symmetric: bool = True) -> QuantizedTensor:
    scheme = Scheme(IntGrid(bits), granularity, symmetric)
    weight = torch.randn(64, 96, generator=torch.Generator().manual_seed(bits)) + 0.1
    return QuantizedTensor(*rtn(weight, scheme, torch.bfloat16), scheme, (64, 96))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("granularity", [PerChannel(), PerGroup(32), PerTensor()], ids=str)
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_rows_are_those_of_the_table_bit_for_bit(bits: int, granularity: Granularity, symmetric: bool) -> None:
    tensor = quantized(bits, granularity, symmetric)
    embedding = PackedEmbedding(PackedLinear(tensor))
    for specialized in (False, True):
        if specialized:
            embedding.specialize(SPARE)
        for dtype in (torch.float32, torch.bfloat16):
            found = embedding(IDS, dtype)
            assert found.dtype == dtype
            assert torch.equal(found, tensor.dequantize(dtype)[IDS])


def test_only_layouts_with_rows_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    from qat.kernels.cpu import w4a16 as cpu

    monkeypatch.setattr(cpu, "_crossover", lambda weight, fast: cpu.NEVER)  # whatever is faster here
    four, eight = (PackedEmbedding(PackedLinear(quantized(*s))) for s in ((4, PerGroup(32)), (8, PerChannel())))
    four.linear.specialize(SPARE)
    assert not isinstance(four.linear.weight, Table)
    four = PackedEmbedding(PackedLinear(quantized(4, PerGroup(32))))
    four.specialize(SPARE)
    eight.specialize(SPARE)
    assert isinstance(four.linear.weight, PackedWeight)
    assert isinstance(eight.linear.weight, cpu.Int8Weight)


def test_it_holds_nothing_beside_its_linear() -> None:
    linear = PackedLinear(quantized(4, PerGroup(32)))
    embedding = PackedEmbedding(linear)
    assert list(embedding.modules()) == [embedding, linear]
    assert not list(embedding.parameters())
    assert not list(embedding.buffers())


def test_a_table_with_a_g_idx_is_refused() -> None:
    with pytest.raises(ValueError, match="a table with a g_idx is not served"):
        PackedEmbedding(PackedLinear(scattered(quantized(4, PerGroup(32)))))
