"""Slots whose old keys no query reads any more: they keep what a window or chunk reaches, and a little slack."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pluglm.contracts import KVSlot
from pluglm_caches.cells import Cells
from pluglm_caches.stores import Pass, moved, zeros
from pluglm_caches.tokens import KVStore

_FIRST_ROOM = 64


class WindowStore(KVStore):
    """Keys and values of the last cells, in order, in a tensor of constant size.

    New cells are written behind the old ones. At the end of the tensor the cells that are still read, and `slack`
    before them, move to its front: each cell is copied at most twice on average, and a view is always one slice in the
    order of the text, which a ring is not. A pass longer than the tensor makes it larger until the pass is over.

    Args:
        window, chunk: as in the slot. slack: tokens that every row can take back: what is read after that is kept, too.
    """

    kind = "window"

    def __init__(
        self,
        first: Tensor,
        second: Tensor,
        *,
        window: int | None,
        chunk: int | None,
        slack: int,
        hint: int | None = None,
    ) -> None:
        super().__init__(first, second, hint=hint)
        self.window, self.chunk, self.slack = window, chunk, slack
        needed = min(size for size in (window, chunk) if size is not None) + slack + self.spare
        #: Cells of the tensor once it is as large as it will stay.
        self.size = max(_FIRST_ROOM, needed + needed // 2)

    @classmethod
    def of(
        cls, slot: KVSlot, rows: int, dtype: torch.dtype, device: torch.device, *, slack: int, hint: int | None
    ) -> WindowStore:
        """Storage for one layer with a window or chunks."""
        k = zeros((rows, slot.num_kv_heads, 0, slot.head_dim), dtype, device)
        v = zeros((rows, slot.num_kv_heads, 0, slot.v_head_dim), dtype, device)
        return cls(k, v, window=slot.window, chunk=slot.chunk, slack=slack, hint=hint)

    def begin(self, cells: Cells, count: int) -> None:
        """Drop what is no longer read; a larger tensor only if that is not enough."""
        if cells.length + count <= self.room:
            return
        start, held = self._kept(cells)
        needed, size = held + count + self.spare, self.one.shape[self.axis]
        wanted = min(self.size, max(_FIRST_ROOM, needed + needed // 2))  # less, and cells would move too often
        if self.hint is not None and cells.length + count <= self.hint:
            wanted = min(wanted, self.hint + self.spare)
        self._move(start, held, max(size, needed, wanted))

    def settle(self, cells: Cells) -> None:
        """Back to the constant size after a long pass."""
        if self.one.shape[self.axis] > self.size:
            start, held = self._kept(cells)
            self._move(start, held, max(held + self.spare, self.size))

    def _kept(self, cells: Cells) -> tuple[int, int]:
        """The first cell to keep, and how many there are."""
        start = max(self.first, cells.first_read(self.window, self.chunk, back=self.slack))
        return start, cells.length - start

    def _move(self, start: int, held: int, size: int) -> None:
        self.one, self.two = (moved(t, self.axis, start - self.first, held, size) for t in (self.one, self.two))
        self.first, self.room = start, start + size - self.spare

    def seen_from(self, current: Pass) -> int:
        """Dense cells are cut to what the first query reads; of others the mask hides what is out of reach."""
        if not current.dense:
            return self.first
        return max(self.first, current.cells.first_read(self.window, self.chunk))

    def write(self, k: Tensor, v: Tensor, current: Pass) -> Any:
        """Write the pass, hand out what it reads."""
        self.put(k, v, current.start - self.first, current.count)
        return self.read(self.seen_from(current), current.end)

    def lacks(self, cells: Cells, length: int) -> bool:
        if not length or not self.first:
            return False
        return length < self.first or cells.first_read(self.window, self.chunk, length=length) < self.first

    def like(self, one: Tensor, two: Tensor) -> WindowStore:
        return type(self)(one, two, window=self.window, chunk=self.chunk, slack=self.slack, hint=self.hint)

    def suffices(self, cells: int, held: int) -> bool:
        """A file of any layout with these slots: how many cells are in reach depends on positions, gaps and chunks."""
        return 0 <= cells <= held
