"""Block tables: which pages hold the cells of each row of one cache, for one group of slots."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pluglm.contracts import KVSlot
from pluglm_caches.cells import Cells
from pluglm_caches.paged_pool import PagePool


@dataclass(frozen=True)
class Reach:
    """How far back the queries of a slot look; slots of equal reach share block tables. As in `KVSlot`."""

    window: int | None = None
    chunk: int | None = None

    @classmethod
    def of(cls, slot: KVSlot) -> Reach:
        """The reach of one slot."""
        return cls(slot.window, slot.chunk)

    @property
    def cells(self) -> int | None:
        """Keys before the query that it can see at most, without holes. None: all."""
        return min((size - 1 for size in (self.window, self.chunk) if size is not None), default=None)

    def first_read(self, position: int) -> int:
        """The first position that a query at `position` sees."""
        by_window = 0 if self.window is None else max(0, position - self.window + 1)
        return max(by_window, 0 if self.chunk is None else position // self.chunk * self.chunk)


class PageTable:
    """The pages of every row, in the order of the text. All operations are for all slots of the group at once.

    Pages before the last committed cell may have other owners; the cells up to `room` lie in pages that have not. When
    the table is garbage, a finaliser gives its pages back.

    Args:
        slack: cells beyond the reach that are kept, so that as many can be taken back.
    Attributes:
        rows: page numbers, equally many a row; changed in place, because the finaliser holds the same list.
        first: the cell that entry 0 of every row's first page is for.
        held: the first cell whose values are known; after `open` it may be later than `first`.
        room: the cell up to which a pass may write.
    """

    def __init__(self, pool: PagePool, reach: Reach, slack: int, rows: Sequence[list[int]]) -> None:
        self.pool, self.reach, self.slack = pool, reach, slack
        self.rows = list(rows)
        self.first = self.held = self.room = 0
        self._settled = 0  # the length at which `settle` looked last
        self._pages: Tensor | None = None
        self._block: tuple[int, int, Tensor, Tensor] | None = None
        self._where: tuple[int, int, Tensor] | None = None
        weakref.finalize(self, pool.leave, self.rows).atexit = False

    def begin(self, cells: Cells, count: int) -> None:
        """Have room for `count` cells more: drop pages out of reach, copy those with other owners, take new ones."""
        length = cells.length
        if length + count <= self.room:
            return
        self._drop(cells)
        full, begun = divmod(length - self.first, self.pool.page_size)
        if begun:
            owned = self.pool.own([row[full] for row in self.rows])
            for row, page in zip(self.rows, owned, strict=True):
                row[full] = page
            self._changed()
        self._cover(length + count)

    def settle(self, cells: Cells) -> None:
        """After a long pass: drop what it alone needed. May ask the device, so once for all slots."""
        reach, length = self.reach.cells, cells.length
        spare = 2 * self.pool.page_size
        if reach is not None and length - self.first > reach + self.slack + spare and length != self._settled:
            self._settled = length
            self._drop(cells)

    def lacks(self, cells: Cells, length: int) -> bool:
        """Whether the last token of the first `length` cells saw some that are no longer held."""
        if not length or not self.held:
            return False
        return length < self.held or self._first_read(cells, length=length) < self.held

    def crop(self, length: int) -> None:
        """Keep the cells before `length`."""
        if not length:
            self.forget()
            return
        covered = self._covering(length)
        for row in self.rows:
            self.pool.release(row[covered:])
            del row[covered:]
        self.room = length  # the last page may have other owners: `begin` will see
        self._changed()

    def forget(self) -> None:
        """Give every page back."""
        for row in self.rows:
            self.pool.release(row)
            row.clear()
        self.first = self.held = self.room = self._settled = 0
        self._changed()

    def open(self, first: int, length: int) -> None:
        """Pages for the cells [first, length) of a file. Each slot of a group calls it; the latest `first` counts."""
        if not self.rows[0]:
            self.first = first
            self._cover(length)
        self.held = max(self.held, first)

    def adopt(self, rows: Sequence[Sequence[int]], first: int, length: int) -> None:
        """Become an owner of pages that hold the cells [first, length), a whole number of pages. The table is empty."""
        for own, pages in zip(self.rows, rows, strict=True):
            self.pool.share(pages)
            own[:] = pages
        self.first = self.held = first
        self.room = length
        self._changed()

    def take_rows(self, index: Sequence[int], length: int) -> None:
        """Row i becomes what row index[i] was; pages are shared, not copied."""
        chosen = self._shared(index, length)
        for row in self.rows:
            self.pool.release(row)
        self.rows[:] = chosen
        self.room = length
        self._changed()

    def copy(self, length: int) -> PageTable:
        """A table of its own that shares the pages of the first `length` cells."""
        twin = PageTable(self.pool, self.reach, self.slack, self._shared(range(len(self.rows)), length))
        twin.first, twin.held = self.first, self.held
        twin.room = self.room = length
        return twin

    def block(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """[B, N] int32 pages and [B] int32 lengths of the cells [start, end); `start` begins a page."""
        if self._block is None or self._block[:2] != (start, end):
            skipped, covered = (start - self.first) // self.pool.page_size, self._covering(end)
            with torch.inference_mode(False):
                lengths = torch.full((len(self.rows),), end - start, dtype=torch.int32, device=self.pool.device)
                self._block = start, end, self._numbers().narrow(1, skipped, covered - skipped), lengths
        return self._block[2:]

    def where(self, start: int, count: int) -> Tensor:
        """[B * count] int64: the entries of the cells [start, start + count) in a pool seen as [P * page_size]."""
        if self._where is None or self._where[:2] != (start, count):
            size = self.pool.page_size
            with torch.inference_mode(False):
                cells = torch.arange(start - self.first, start - self.first + count, device=self.pool.device)
                pages = self._numbers().index_select(1, cells // size).long()  # [B, T]
                self._where = start, count, (pages * size + cells % size).flatten()
        return self._where[2]

    def page_of(self, row: int, cell: int) -> int | None:
        """The page of a cell that begins one; None if it was dropped."""
        at = (cell - self.first) // self.pool.page_size
        return self.rows[row][at] if cell >= self.held else None

    def tensors(self) -> list[Tensor]:
        """Everything of its own that occupies memory."""
        made = [self._pages, *(self._block[3:] if self._block else ()), *(self._where[2:] if self._where else ())]
        return [tensor for tensor in made if tensor is not None]

    def _numbers(self) -> Tensor:
        if self._pages is None:
            self._pages = torch.tensor(self.rows, dtype=torch.int32, device=self.pool.device)
        return self._pages

    def _shared(self, index: Sequence[int], length: int) -> list[list[int]]:
        covered = self._covering(length)
        chosen = [self.rows[i][:covered] for i in index]
        for row in chosen:
            self.pool.share(row)
        return chosen

    def _covering(self, length: int) -> int:
        """How many pages hold the cells [first, length)."""
        return -(-(length - self.first) // self.pool.page_size)

    def _cover(self, length: int) -> None:
        """Take the pages that are missing up to `length`."""
        covered = self._covering(length)
        missing = max(0, covered - len(self.rows[0]))
        fresh = self.pool.take(missing * len(self.rows))
        for i, row in enumerate(self.rows):
            row += fresh[i * missing : (i + 1) * missing]
        self.room = self.first + len(self.rows[0]) * self.pool.page_size
        self._changed()

    def _drop(self, cells: Cells) -> None:
        """Give back the pages of which no query reads a cell, even after `slack` cells were taken back."""
        if self.reach.cells is None:
            return
        start = self._first_read(cells, back=self.slack)
        dropped = max(0, start - self.first) // self.pool.page_size
        for row in self.rows:
            self.pool.release(row[:dropped])
            del row[:dropped]
        self.first += dropped * self.pool.page_size
        self.held = max(self.held, self.first)
        self._changed()

    def _first_read(self, cells: Cells, *, length: int | None = None, back: int = 0) -> int:
        """The first cell that some row's last token saw, `back` tokens earlier: a later pass may be padding alone."""
        return cells.first_read(self.reach.window, self.reach.chunk, length=length, back=back + 1)

    def _changed(self) -> None:
        self._pages = self._block = self._where = None
