"""Codes to words and back: the only bit-twiddling in the project.

Dense little-endian bitstream: code k of a row occupies bits [k*b, (k+1)*b) counted from bit 0 of the row's first int32
word. Widths that do not divide 32 straddle words. For b = 3 the first two words hold

    word 0   bit 0                                                    bit 31
             [ c0 ][ c1 ][ c2 ] ... [ c9 ][c10: bits 0-1]
    word 1   [c10: bit 2][ c11 ] ... [ c20 ][c21: bit 0]

Eight codes always fill exactly b bytes, whatever the width, so both directions work on such an octet: its b bytes form
the low end of one int64, whose codes are moved apart to one per byte (or together again) in three halving steps. For
b = 3 and the octet h g f e d c b a:

    bit 63                                                        bit 0
    .....................................................hhhgggfffeeedddcccbbbaaa      the octet's 24 bits
    ....................hhhgggfffeee....................dddcccbbbaaa                  4 codes to every 32 bits
    ..........hhhggg..........fffeee..........dddccc..........bbbaaa                  2 codes to every 16 bits
    .....hhh.....ggg.....fff.....eee.....ddd.....ccc.....bbb.....aaa                  1 code to every byte

Every step is one vectorized operation on whole tensors, on any device; words and bytes are little-endian, as every
machine that torch runs on is.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SPAN = 32  # codes that fill a whole number of words, whatever their width
BYTES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def num_words(columns: int, bits: int) -> int:
    """Words that hold `columns` codes of `bits` bits."""
    return -(-columns * bits // 32)


def offset(bits: int) -> int:
    """What is added to signed codes so that they pack unsigned: `2**(bits-1)`."""
    return 1 << (bits - 1)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Packs unsigned codes along the last axis.

    Args:
        codes: Integers in `[0, 2**bits)`, `[R, C]`.
        bits: Width, 1 to 8.

    Returns:
        int32 words, `[R, ceil(C * bits / 32)]`; bits after the last code are 0.

    Raises:
        ValueError: `codes` is not a matrix, or a code does not fit the width.
    """
    if codes.dim() != 2:
        raise ValueError(f"codes of shape {tuple(codes.shape)}: pack expects a matrix")
    if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= 2**bits):
        raise ValueError(f"codes in [{int(codes.min())}, {int(codes.max())}] do not fit {bits} unsigned bits")
    rows, columns = codes.shape
    spans = -(-columns // SPAN)
    padded = torch.zeros(rows, spans * SPAN, dtype=torch.uint8, device=codes.device)
    padded[:, :columns] = codes
    octets = padded.flatten().view(torch.int64)
    for half in (1, 2, 4):
        upper, shift = _step(half, bits)
        moved = octets & (upper << shift)
        octets.sub_(moved).add_(moved >> shift)
    stream = octets.view(torch.uint8).view(-1, 8)[:, :bits].contiguous().flatten()
    return (
        stream.view(torch.int32).view(rows, spans * bits)[:, : num_words(columns, bits)].clone()
    )  # not a view of more


def unpack(words: Tensor, bits: int, columns: int) -> Tensor:
    """Unsigned codes `[R, columns]` (uint8) of packed words `[R, ceil(columns * bits / 32)]`.

    Raises:
        ValueError: The words are not a matrix of that width.
    """
    if words.dim() != 2 or words.shape[1] != num_words(columns, bits):
        raise ValueError(
            f"packed words of shape {tuple(words.shape)}: {columns} codes of {bits} bits need "
            f"[rows, {num_words(columns, bits)}]"
        )
    rows, spans = words.shape[0], -(-columns // SPAN)
    words = F.pad(words, (0, spans * bits - words.shape[1])).flatten()
    if bits in BYTES:  # an octet is a machine integer: twice as fast as moving bytes
        octets = words.view(BYTES[bits]).to(torch.int64, copy=True)
        octets.bitwise_and_(_signed((1 << 8 * bits) - 1))
    else:
        octets = F.pad(words.view(torch.uint8).view(-1, bits), (0, 8 - bits)).flatten().view(torch.int64)
    for half in (4, 2, 1) if bits < 8 else ():
        upper, shift = _step(half, bits)
        octets.add_(octets & upper, alpha=(1 << shift) - 1)  # x - u + (u << shift), modulo 2**64
    return octets.view(torch.uint8).view(rows, spans * SPAN)[:, :columns].contiguous()


def _step(half: int, bits: int) -> tuple[int, int]:
    """One halving step: the mask of each lane's upper `half` codes while they lie dense, and how far they move up."""
    upper = sum(((1 << half * bits) - 1) << (lane + half * bits) for lane in range(0, 64, 16 * half))
    return _signed(upper), half * (8 - bits)


def _signed(mask: int) -> int:
    return mask - 2**64 if mask >= 2**63 else mask


def pack_nibbles(codes: Tensor) -> Tensor:
    """Signed 4-bit codes (int8, `[..., D]`, D even), two in a byte (uint8 `[..., D / 2]`), each plus 8, low half first.

    The same bits as `pack` for 4 bits, on any shape and without a look at the values.
    """
    unsigned = (codes + 8).view(torch.uint8)
    return unsigned[..., 0::2] | unsigned[..., 1::2] << 4


def unpack_nibbles(packed: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`: int8 `[..., D]`."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten(-2).view(torch.int8) - 8
