"""Small whole numbers in bytes: one 8-bit, two 4-bit or four 2-bit numbers each.

The cells of a block are packed with one another: byte r of a block of g cells with p numbers a byte holds the cells
r, r + g / p, r + 2 g / p, … of one channel. So any number of channels packs without a remainder, and a block unpacks to
its cells in order by shifts and masks alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Widths that fill a byte.
WIDTHS = (8, 4, 2)


def pack(numbers: Tensor, bits: int, axis: int) -> Tensor:
    """Pack along one axis.

    Args:
        numbers: uint8, each below 2 ** bits. The size of `axis` is a multiple of 8 / bits.
    Returns: uint8, `axis` as many times shorter as numbers fit into a byte; the other axes as they are.
    """
    if bits == 8:
        return numbers
    planes = torch.unflatten(numbers, axis, (8 // bits, -1))
    shifted = torch.bitwise_left_shift(planes, _shifts(bits, planes, axis))
    return shifted.sum(axis, dtype=torch.uint8)  # disjoint bits: the sum is their union


def unpack(packed: Tensor, bits: int, axis: int) -> Tensor:
    """What `pack` was given: uint8."""
    if bits == 8:
        return packed
    planes = packed.unsqueeze(axis)
    shifted = torch.bitwise_right_shift(planes, _shifts(bits, planes, axis))
    return shifted.bitwise_and_(2**bits - 1).flatten(axis, axis + 1)


def _shifts(bits: int, like: Tensor, axis: int) -> Tensor:
    """0, bits, 2 bits, … along `axis`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=like.device)
    return shifts.view(-1, *(1,) * (like.dim() - axis - 1))
