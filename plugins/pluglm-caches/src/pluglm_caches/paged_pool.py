"""A pool of pages: fixed numbers of cells that tables share, count and give back.

Source: Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention", sections
4.1 to 4.4 (pages, block tables, reference counts, copy on write).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence

import torch

from pluglm.contracts import KVSlot
from pluglm_caches.stores import resized, zeros

_FIRST_PAGES = 8


class PagePool:
    """The pages of one group of slots, those that drop cells at the same time. Used by one thread at a time.

    Page n is entry n of every slot's two tensors, so one block table serves the group. Storage grows by half, and is
    kept when pages become free.

    Attributes:
        k: slot -> [P, page_size, K, D]. v: slot -> [P, page_size, K, Dv].
        owners: how many rows, and published prefixes, refer to each page. 0: it is free.
        num_copied: pages that were copied so far because one of several owners was about to write.
    """

    def __init__(self, slots: Mapping[int, KVSlot], page_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.page_size, self.device = page_size, device
        self.k = {i: zeros((0, page_size, s.num_kv_heads, s.head_dim), dtype, device) for i, s in slots.items()}
        self.v = {i: zeros((0, page_size, s.num_kv_heads, s.v_head_dim), dtype, device) for i, s in slots.items()}
        self.owners: list[int] = []
        self.num_copied = 0
        self._free: list[int] = []
        self._left: deque[list[list[int]]] = deque()

    @property
    def num_pages(self) -> int:
        """Pages in all."""
        return len(self.owners)

    @property
    def num_free(self) -> int:
        """Pages that nobody refers to."""
        self._collect()
        return len(self._free)

    def take(self, count: int) -> list[int]:
        """Pages with one owner, the caller. What they hold is finite and means nothing."""
        self._collect()
        if count > len(self._free):
            self._grow(self.num_pages + count - len(self._free))
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self.owners[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """One owner more for each."""
        for page in pages:
            self.owners[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """One owner less for each; the last one gone, the page is free."""
        for page in pages:
            self.owners[page] -= 1
            if not self.owners[page]:
                self._free.append(page)

    def own(self, pages: Sequence[int]) -> list[int]:
        """For a caller who owns each page once and is about to write: the page if nobody else has it, else a copy."""
        again: Counter[int] = Counter()
        shared = []
        for i, page in enumerate(pages):
            if self.owners[page] - again[page] > 1:
                again[page] += 1
                shared.append(i)
        owned = list(pages)
        if shared:
            copies, sources = self.take(len(shared)), [pages[i] for i in shared]
            self._copy(sources, copies)
            self.release(sources)
            for i, page in zip(shared, copies, strict=True):
                owned[i] = page
        return owned

    def leave(self, rows: list[list[int]]) -> None:
        """Note that the owner of these pages is gone. Safe at any moment, so also in a finaliser.

        The garbage collector may call it in the midst of `take`; so it only leaves a note for the next one.
        """
        self._left.append(rows)

    def _collect(self) -> None:
        while self._left:
            for row in self._left.popleft():
                self.release(row)

    def _grow(self, needed: int) -> None:
        size = max(_FIRST_PAGES, needed, self.num_pages + self.num_pages // 2)
        for tensors in (self.k, self.v):
            for slot, old in tensors.items():
                tensors[slot] = resized(old, 0, size, old.shape[0])
        self._free[:0] = range(size - 1, self.num_pages - 1, -1)
        self.owners += [0] * (size - self.num_pages)

    def _copy(self, sources: Sequence[int], copies: Sequence[int]) -> None:
        source, copy = (torch.tensor(pages, device=self.device) for pages in (sources, copies))
        with torch.no_grad():
            for pages in (*self.k.values(), *self.v.values()):
                pages.index_copy_(0, copy, pages.index_select(0, source))
        self.num_copied += len(copies)
