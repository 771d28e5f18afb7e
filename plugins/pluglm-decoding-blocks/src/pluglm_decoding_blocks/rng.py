"""Random numbers that depend on a seed and a position alone: counter-based, the same on every device and in any batch.

Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011, "Parallel random numbers: as easy as 1, 2, 3", section 3.3; constants
and known answers from Random123 1.09). The key is the request's 64-bit seed. The counter is (position, 0, stream):
stream 0 draws tokens, 1 derives the seeds of further rows, 2 draws a draft's tokens, 3 decides whether they are
accepted; others are free.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor

from pluglm.errors import InputError

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
TOKENS, ROWS, DRAFTS, ACCEPTANCES = 0, 1, 2, 3
_BLOCK = 128


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a·b, for 32-bit numbers in int64; by halves of b, so nothing overflows."""
    low = a * (b & 0xFFFF)
    middle = a * (b >> 16) + (low >> 16)
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10. counter: four, key: two int64 tensors of 32-bit numbers that broadcast. Returns four of them."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _product(c0, _MULTIPLIERS[0])
        high1, low1 = _product(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def _words(seeds: Tensor, positions: Tensor, stream: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    zero = torch.zeros_like(positions)
    counter = (positions & _LOW, (positions >> 32) & _LOW, zero, zero + stream)
    return philox(counter, (seeds & _LOW, (seeds >> 32) & _LOW))


def uniforms(seeds: Tensor, positions: Tensor, stream: int = TOKENS) -> Tensor:
    """float64 in [0, 1) with 53 random bits. seeds, positions: int64 tensors that broadcast."""
    w0, w1, _, _ = _words(seeds, positions, stream)
    return ((w0 >> 5) * 2**26 + (w1 >> 6)).double() * 2.0**-53


def signed(seed: int) -> int:
    """The 64 bits of a seed, as int64 holds them."""
    return seed - 2**64 if seed >= 2**63 else seed


def row_seeds(seed: int | Sequence[int] | None, rows: int) -> list[int]:
    """The seed of each row, as int64.

    One seed: row 0 draws with it, row r with a seed derived from (seed, r); so a row can be drawn again alone. A
    sequence has one a row. None: fresh ones from the operating system.
    """
    if seed is None:
        seed = int.from_bytes(os.urandom(8), "little")
    if not isinstance(seed, int):
        return [signed(s) for s in seed]
    w0, w1, _, _ = _words(torch.tensor(signed(seed)), torch.arange(rows), ROWS)
    derived: list[int] = (w0 | (w1 << 32)).tolist()
    return [signed(seed), *derived[1:]]


def call_seeds(seed: int | Sequence[int] | None, rows: int, device: torch.device) -> Tensor:
    """[R] int64, `row_seeds` of a call's `seed`. Raises InputError if there are more or fewer seeds than rows."""
    if isinstance(seed, Sequence) and len(seed) != rows:
        raise InputError(
            f"there are {len(seed)} seeds for {rows} rows.",
            fix="Pass one seed, or one for each sequence that is returned.", argument="seed",
        )  # fmt: skip
    return torch.tensor(row_seeds(seed, rows), device=device)


class Uniforms:
    """The draws of one call, made a block of positions at a time. seeds: [R] int64, on the model's device."""

    def __init__(self, seeds: Tensor, stream: int = TOKENS) -> None:
        self._seeds, self._stream = seeds[:, None], stream
        self._blocks: dict[int, Tensor] = {}  # kept: rows of a ragged batch are at different positions

    def at(self, position: int) -> Tensor:
        """[R] float64, the draws for new token `position`."""
        number, offset = divmod(position, _BLOCK)
        return self._block(number)[offset]

    def each(self, rows: Sequence[int], positions: Sequence[int]) -> Tensor:
        """[n] float64: of row rows[i] the draw for its new token positions[i]."""
        number = positions[0] // _BLOCK
        if all(position // _BLOCK == number for position in positions):
            return self._block(number)[[position % _BLOCK for position in positions], list(rows)]
        pairs = zip(rows, positions, strict=True)
        return torch.stack([self._block(position // _BLOCK)[position % _BLOCK, row] for row, position in pairs])

    def _block(self, number: int) -> Tensor:
        """[block, R]"""
        if number not in self._blocks:
            positions = torch.arange(number * _BLOCK, (number + 1) * _BLOCK, device=self._seeds.device)
            made = uniforms(self._seeds, positions[None], self._stream)  # [R, block]
            self._blocks[number] = made.T.contiguous()
        return self._blocks[number]
