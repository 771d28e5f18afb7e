"""Whole numbers of few bits in bytes or words, as hqq lays them out: the first part of the rows in the highest bits.

Source: `BitPack` of hqq 0.2.8.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Bits -> the name of the layout, which files hold.
PACKING = {8: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1: "1bit_u8"}
#: Bits -> codes to an element. Ten codes of 3 bits fill 30 bits of a word.
PER = {8: 1, 4: 2, 3: 10, 2: 4, 1: 8}


def storage(bits: int) -> torch.dtype:
    """The dtype of packed codes."""
    return torch.int32 if bits == 3 else torch.uint8


def pack(codes: Tensor, bits: int) -> Tensor:
    """codes: [n, m], whole numbers in any dtype. Returns [n / PER, m]; n is filled up with zeros for 3 bits only."""
    whole = codes.to(storage(bits))
    per = PER[bits]
    if short := -len(whole) % per:
        assert bits == 3, f"{len(whole)} rows do not fill elements of {per} codes"
        whole = torch.cat((whole, whole.new_zeros(short, whole.shape[1])))
    packed = torch.zeros_like(whole[: len(whole) // per])
    for i, part in enumerate(whole.chunk(per)):
        packed |= part << bits * (per - 1 - i)
    return packed


def unpack(packed: Tensor, bits: int, rows: int) -> Tensor:
    """The inverse of `pack`, with its dtype. Returns [rows, m]."""
    per = PER[bits]
    if per == 1:
        return packed
    mask = (1 << bits) - 1
    return torch.cat([packed >> bits * (per - 1 - i) & mask for i in range(per)])[:rows]
