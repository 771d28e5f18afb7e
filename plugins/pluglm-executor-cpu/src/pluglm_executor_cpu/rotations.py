"""cos and sin for the library: tables by position, except for the kinds that look at a row's length in each pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pluglm_blocks import RotaryTable
from torch import Tensor

from pluglm.contracts import Rope
from pluglm_executor_cpu import native

#: Kinds whose angles follow from the position alone.
_BY_POSITION = frozenset({"default", "linear", "llama3", "proportional", "yarn"})
_FIRST = 256


class Rotations:
    """The library's rotations; `pluglm_blocks.RotaryTable` computes every number of them."""

    def __init__(self, ropes: Sequence[Rope]) -> None:
        self._tables = [RotaryTable(rope) for rope in ropes]
        self._by_position = [rope.kind in _BY_POSITION for rope in ropes]
        self._held: list[tuple[Tensor, Tensor]] = [(torch.empty(0), torch.empty(0))] * len(ropes)
        self.array = (native.Rotation * max(len(ropes), 1))()
        self._reach = 0  # positions that every table has
        self._of_pass = [i for i, fixed in enumerate(self._by_position) if not fixed]

    @property
    def by_position(self) -> bool:
        """Whether all angles follow from positions, whatever else is in a pass."""
        return not self._of_pass

    def reach(self, positions: Tensor, end: int | None) -> None:
        """Have cos and sin of these positions [B or 1, T]. end: one more than the highest, where it is known."""
        if not self._tables:
            return
        for i in self._of_pass:
            cos, sin = (x.contiguous() for x in self._tables[i].cos_sin(positions.clamp(min=0)))
            row = cos.stride(0) if cos.shape[0] > 1 else 0
            self._held[i] = (cos, sin)
            self.array[i] = native.Rotation(cos.data_ptr(), sin.data_ptr(), cos.shape[2], 0, row)
        if len(self._of_pass) == len(self._tables):
            return
        if end is None:
            end = int(positions.max()) + 1
        if end > self._reach:
            self._grow(max(_FIRST, end + end // 2))

    def _grow(self, count: int) -> None:
        with torch.inference_mode(False), torch.no_grad():
            positions = torch.arange(count, device="cpu")[None]
            for i, table in enumerate(self._tables):
                if self._by_position[i]:
                    cos, sin = (x[0].contiguous() for x in table.cos_sin(positions))
                    self._held[i] = (cos, sin)
                    self.array[i] = native.Rotation(cos.data_ptr(), sin.data_ptr(), cos.shape[1], count, 0)
        self._reach = count
