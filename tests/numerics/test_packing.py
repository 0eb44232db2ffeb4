"""Law (a): unpack(pack(q)) == q for every width and shape, in the bit order that the module draws."""

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from qat.numerics.packing import num_words, pack, pack_nibbles, unpack, unpack_nibbles

WIDTHS = range(1, 9)
COLUMNS = (0, 1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 100, 576)


def draw(rows: int, columns: int, bits: int) -> torch.Tensor:
    codes = torch.randint(0, 2**bits, (rows, columns), generator=torch.Generator().manual_seed(columns * 8 + bits))
    if columns:
        codes[0, -1], codes[-1, 0] = 2**bits - 1, 2**bits - 1  # all ones at both edges
    return codes


def bitstream(row: list[int], bits: int) -> list[int]:
    """The specification in Python integers."""
    stream = sum(code << bits * k for k, code in enumerate(row))
    words = [stream >> 32 * w & 0xFFFFFFFF for w in range(num_words(len(row), bits))]
    return [w - 2**32 if w >= 2**31 else w for w in words]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("rows", [1, 5])
def test_round_trip_and_bit_order(bits: int, columns: int, rows: int) -> None:
    codes = draw(rows, columns, bits)
    words = pack(codes, bits)
    assert words.dtype == torch.int32
    assert words.is_contiguous()
    assert words.untyped_storage().nbytes() == words.nbytes  # safetensors refuses a view of more
    assert words.tolist() == [bitstream(row, bits) for row in codes.tolist()]
    before = words.clone()
    assert torch.equal(unpack(words, bits, columns).long(), codes)
    assert torch.equal(words, before)


@pytest.mark.parametrize("bits", WIDTHS)
def test_results_share_no_memory_with_their_input(bits: int) -> None:
    codes = draw(4, 64, bits).to(torch.uint8)
    words, before = pack(codes, bits), codes.clone()
    unpacked = unpack(words, bits, 64)
    unpacked.fill_(0)
    assert torch.equal(codes, before)
    assert torch.equal(unpack(words, bits, 64), before)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype_and_layout_packs_alike(dtype: torch.dtype) -> None:
    codes = draw(6, 40, 5)
    assert torch.equal(pack(codes.to(dtype), 5), pack(codes, 5))
    assert torch.equal(pack(codes.T.contiguous().T.to(dtype), 5), pack(codes, 5))
    words = pack(codes, 5)
    assert torch.equal(unpack(words.T.contiguous().T, 5, 40).long(), codes)
    assert torch.equal(unpack(words[2:4], 5, 40).long(), codes[2:4])


def test_golden_words() -> None:
    three = torch.tensor([[1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4]])
    assert [w & 0xFFFFFFFF for w in pack(three, 3)[0].tolist()] == [0xD11F58D1, 0x8]
    four = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]])
    assert [w & 0xFFFFFFFF for w in pack(four, 4)[0].tolist()] == [0x76543210, 0xCBA98]


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("columns", [32, 33, 100])
def test_same_words_as_compressed_tensors(bits: int, columns: int) -> None:
    codes = draw(7, columns, bits)
    theirs = pack_to_int32((codes - 2 ** (bits - 1)).to(torch.int8), bits)
    assert torch.equal(pack(codes, bits), theirs)


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"\[0, 8\] do not fit 3"):
        pack(torch.tensor([[0, 8]]), 3)
    with pytest.raises(ValueError, match="do not fit"):
        pack(torch.tensor([[-1, 1]]), 3)
    with pytest.raises(ValueError, match="expects a matrix"):
        pack(torch.zeros(4, dtype=torch.int64), 3)
    with pytest.raises(ValueError, match="need"):
        unpack(torch.zeros(2, 3, dtype=torch.int32), 4, 33)


@pytest.mark.parametrize("shape", [(2,), (3, 64), (2, 5, 3, 24), (0, 4)])
def test_nibbles_are_the_dense_bitstream_on_any_shape(shape: tuple[int, ...]) -> None:
    codes = torch.randint(-8, 8, shape, generator=torch.Generator().manual_seed(0)).to(torch.int8)
    packed = pack_nibbles(codes)
    assert packed.dtype == torch.uint8
    assert packed.shape == (*shape[:-1], shape[-1] // 2)
    assert torch.equal(unpack_nibbles(packed), codes)
    rows = codes.reshape(-1, shape[-1]).short() + 8
    dense = pack(rows, 4).view(torch.uint8)[:, : shape[-1] // 2] if len(rows) else packed
    assert torch.equal(packed.reshape(dense.shape), dense)
