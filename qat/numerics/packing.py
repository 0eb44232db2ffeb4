"""Codes to words and back: the only bit-twiddling in the project.

Dense little-endian bitstream: code k of a row occupies bits [k*b, (k+1)*b) counted from bit 0 of the row's first int32
word. Widths that do not divide 32 straddle words. For b = 3 the first two words hold

    word 0   bit 0                                                    bit 31
             [ c0 ][ c1 ][ c2 ] ... [ c9 ][c10: bits 0-1]
    word 1   [c10: bit 2][ c11 ] ... [ c20 ][c21: bit 0]

so 32 codes always fill exactly b words, and both loops below run over one such span.
"""

import torch
from torch import Tensor

SPAN = 32  # codes that fill a whole number of words, whatever their width


def num_words(columns: int, bits: int) -> int:
    """Words that hold `columns` codes of `bits` bits."""
    return -(-columns * bits // 32)


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
    padded = torch.zeros(rows, spans * SPAN, dtype=torch.int64, device=codes.device)
    padded[:, :columns] = codes
    padded = padded.view(rows, spans, SPAN)
    words = torch.zeros(rows, spans, bits, dtype=torch.int64, device=codes.device)
    for k in range(SPAN):
        word, shift = divmod(k * bits, 32)
        words[..., word] |= padded[..., k] << shift
        if shift + bits > 32:  # the code straddles: its high bits open the next word
            words[..., word + 1] |= padded[..., k] >> (32 - shift)
    words &= 0xFFFFFFFF
    words = torch.where(words >= 2**31, words - 2**32, words)  # int64 holding a uint32 -> int32, bit for bit
    return words.to(torch.int32).view(rows, -1)[:, : num_words(columns, bits)].contiguous()


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
    rows = words.shape[0]
    spans = -(-columns // SPAN)
    padded = torch.zeros(rows, spans * bits, dtype=torch.int64, device=words.device)
    padded[:, : words.shape[1]] = words.to(torch.int64) & 0xFFFFFFFF
    padded = padded.view(rows, spans, bits)
    codes = torch.empty(rows, spans, SPAN, dtype=torch.uint8, device=words.device)
    mask = 2**bits - 1
    for k in range(SPAN):
        word, shift = divmod(k * bits, 32)
        code = padded[..., word] >> shift
        if shift + bits > 32:
            code = code | (padded[..., word + 1] << (32 - shift))
        codes[..., k] = (code & mask).to(torch.uint8)
    return codes.view(rows, -1)[:, :columns].contiguous()
