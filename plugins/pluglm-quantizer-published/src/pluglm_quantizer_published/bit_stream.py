"""Codes of a few bits that lie one behind the other in 32-bit words, across word borders where they do not fit."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 32


def unpack(words: Tensor, bits: int, count: int) -> Tensor:
    """The first `count` codes of each row.

    Code i takes the bits i * bits … (i + 1) * bits - 1 of its row, counted from the lowest bit of the first word.

    Args:
        words: [rows, n] int32; n * 32 >= count * bits. bits: 1 to 8.
    Returns: [rows, count] uint8.
    """
    if bits in (1, 2, 4, 8):  # no code crosses a byte
        return _in_bytes(words, bits)[:, :count]
    return _across_words(words, bits)[:, :count]


def words_for(count: int, bits: int) -> int:
    """How many words hold `count` codes."""
    return -(-count * bits // WORD)


def _in_bytes(words: Tensor, bits: int) -> Tensor:
    """[rows, n] int32 -> [rows, n * 32 / bits] uint8."""
    octets = words.contiguous().view(torch.uint8)  # lowest byte first on every machine that torch runs on
    if bits == 8:
        return octets
    shifts = range(0, 8, bits)
    codes = torch.empty(*octets.shape, len(shifts), dtype=torch.uint8, device=words.device)
    for i, shift in enumerate(shifts):
        codes[..., i] = octets >> shift & (1 << bits) - 1
    return codes.flatten(1)


def _across_words(words: Tensor, bits: int) -> Tensor:
    """32 codes take `bits` words: each of the 32 lies at the same place in every run of words."""
    rows, n = words.shape
    runs = -(-n // bits)
    words = torch.nn.functional.pad(words, (0, runs * bits - n)).view(rows, runs, bits)
    codes = torch.empty(rows, runs, WORD, dtype=torch.uint8, device=words.device)
    for i in range(WORD):
        word, shift = divmod(i * bits, WORD)
        low = min(bits, WORD - shift)  # bits of this code that are in `word`; the rest is in the next one
        code = words[:, :, word] >> shift & (1 << low) - 1
        if low < bits:
            code = code | (words[:, :, word + 1] & (1 << bits - low) - 1) << low
        codes[:, :, i] = code
    return codes.flatten(1)
