"""A run of several tokens as the library sees it, and the positions of its cells."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import addressof, c_float, c_int64
from typing import Any

import torch
from torch import Tensor

from pluglm.contracts import DecodeRun
from pluglm_executor_cpu import native


def positions_of(run: DecodeRun, count: int) -> tuple[Tensor, bool]:
    """[B or 1, count] int64 of a run's first cells, and whether they are known to be the cells' own numbers."""
    positions = run.cache.next_positions(count)
    if run.ended is None or not run.holes:
        return positions, run.cache.dense
    return torch.where(torch.tensor(run.ended)[:, None], -1, positions), False


class Books:
    """The library's books of one run, and the memory that they point to.

    Attributes:
        run: `address` is where it lies. tokens: [B, count + 1] int64, the tokens fed first, then what is chosen.
    """

    def __init__(self, run: DecodeRun, count: int, num_groups: int) -> None:
        """count: tokens a row at most, of this call."""
        rows = run.token_ids.shape[0]
        self.tokens = torch.empty((rows, count + 1), dtype=torch.int64, device="cpu")
        at = (c_int64 * self.tokens.numel()).from_address(self.tokens.data_ptr())
        for row, (token,) in enumerate(run.token_ids.tolist()):
            at[row * (count + 1)] = token
        drawn = None if run.draw is None else run.draw.seeds
        self._numbers = ends, ended, seeds = _numbers(run.ends), _numbers(run.ended), _numbers(drawn)
        self.run = native.Run(
            count, self.tokens.data_ptr(), ended and addressof(ended), run.pad, addressof(ends), len(run.ends),
            num_groups, seeds and addressof(seeds),
        )  # fmt: skip
        if (draw := run.draw) is not None:
            self.run.first = draw.first
            self.run.temperature, self.run.top_k = draw.temperature, min(draw.top_k, 2**31)
            # Rounded as the tensors are that the strategies compare with.
            self.run.tail = c_float(1 - draw.top_p).value if draw.top_p < 1 else 0.0
            self.run.share = c_float(draw.min_p).value
        self.address = addressof(self.run)


def _numbers(values: Sequence[int] | None) -> Any:
    """An array of the library's whole numbers; None: none."""
    return None if values is None else (c_int64 * len(values))(*values)
