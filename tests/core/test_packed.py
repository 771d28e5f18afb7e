"""Packed weights in the form that kernels read."""

from __future__ import annotations

import pytest
import torch

from pluglm.contracts import GroupedWeight, RowBlocks


def grouped(bits: int, *, signed: bool, rows: int = 21, columns: int = 96, group: int = 32) -> GroupedWeight:
    draw = torch.Generator().manual_seed(bits + rows)
    low, high = (-(1 << bits - 1), 1 << bits - 1) if signed else (0, 1 << bits)
    codes = torch.randint(low, high, (rows, columns), generator=draw).to(torch.int8 if signed else torch.uint8)
    scale, offset = (torch.rand(rows, columns // group, generator=draw).half().float() for _ in range(2))
    return GroupedWeight(bits, group, codes, scale, None if signed else offset)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_row_blocks_hold_the_weight_they_are_made_of(bits: int, signed: bool) -> None:
    weight = grouped(bits, signed=signed)
    blocks = RowBlocks.of(weight)
    assert blocks.scale.shape == (2, 3, 16)
    assert blocks.codes.shape == ((2, 24, 16, 4) if bits == 8 else (2, 12, 16, 4))
    again = blocks.grouped()
    # Of unsigned codes of 8 bits the offset moves by 128 steps and is rounded to float16 there.
    tolerance = 0.13 if bits == 8 and not signed else 0.0
    torch.testing.assert_close(again.dense(), weight.dense(), rtol=0, atol=tolerance)
    assert RowBlocks.of(again).codes.equal(blocks.codes)


def test_wide_groups_become_several_of_32() -> None:
    weight = grouped(4, signed=False, columns=128, group=64)
    blocks = RowBlocks.of(weight)
    assert blocks.scale.shape == (2, 4, 16)
    assert blocks.grouped().dense().equal(weight.dense())


def test_the_bytes_lie_where_the_contract_says() -> None:
    codes = torch.arange(16 * 32).view(16, 32).remainder(16).to(torch.uint8)
    one = torch.ones(16, 1)
    low_and_high = RowBlocks.of(GroupedWeight(4, 32, codes, one, one)).codes[0, 1, 5, 2]  # columns 10 and 14 of row 5
    assert int(low_and_high) == int(codes[5, 10]) | int(codes[5, 14]) << 4
    signed = (codes.to(torch.int16) - 8).to(torch.int8)
    assert RowBlocks.of(GroupedWeight(8, 32, signed, one)).codes[0, 3, 7, 1] == signed[7, 13]


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (grouped(4, signed=True, columns=80, group=16), "groups of 16 columns are not made of groups of 32"),
        (GroupedWeight(4, 32, torch.zeros(2, 32, dtype=torch.uint8), torch.ones(2, 1)), "unsigned codes need an offset"),
        (GroupedWeight(4, 32, torch.zeros(2, 32, dtype=torch.int8), torch.ones(2, 1), torch.ones(2, 1)),
         "signed codes of 4 bits have no offset here"),
        (GroupedWeight(8, 64, torch.zeros(2, 48, dtype=torch.int8), torch.ones(2, 1)), "48 columns are no multiple of 32"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(weight: GroupedWeight, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RowBlocks.of(weight)
