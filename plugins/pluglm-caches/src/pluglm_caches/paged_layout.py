"""The layout `paged`: keys and values in pages that the rows of all caches of a layout share until one of them writes.

Source: Kwon et al. 2023, "Efficient Memory Management for Large Language Model Serving with PagedAttention", section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor

from pluglm.contracts import CacheRequest, CrossSlot, KVSlot
from pluglm.errors import CacheError, InputError
from pluglm_caches.cache import SlotCache
from pluglm_caches.layout import Layout
from pluglm_caches.paged_pool import PagePool
from pluglm_caches.paged_prefix import Entry, Prefixes
from pluglm_caches.paged_store import PagedStore
from pluglm_caches.paged_table import PageTable, Reach
from pluglm_caches.saving import describe

VIEWS = ("paged", "dense")


class PagedCache(SlotCache):
    """See `SlotCache`. Rows, forks and published prefixes share pages; a page is copied when one of its owners writes.

    Attributes:
        tables: a block table for each reach. Its pages go back to the pool when the cache is garbage, or by `reset`.
        prefixes: the layout's published pages.
    """

    def __init__(self, *args: Any, tables: Sequence[PageTable], prefixes: Prefixes, **how: Any) -> None:
        super().__init__(*args, **how)
        self.tables, self.prefixes = list(tables), prefixes

    @property
    def nbytes(self) -> int:
        """As in the contract; the pool counts whole, also if other caches share it."""
        own = (tensor for table in self.tables for tensor in table.tensors())
        return super().nbytes + sum(tensor.untyped_storage().nbytes() for tensor in own)

    def select(self, index: Tensor) -> None:
        """Keep these rows; no page is copied now."""
        super().select(index)
        rows = index.tolist()
        for table in self.tables:
            table.take_rows(rows, self.length)
        self._measure_room()

    def fork(self) -> PagedCache:
        """A cache that shares every page. Whichever side writes into a begun page first copies that page."""
        twin = cast(PagedCache, super().fork())
        twin.tables = [table.copy(self.length) for table in self.tables]
        own = dict(zip(map(id, self.tables), twin.tables, strict=True))
        for store in twin._stores:
            if isinstance(store, PagedStore):
                store.table = own[id(store.table)]
        self._measure_room()
        twin._measure_room()
        return twin

    def adopt_prefix(self, token_ids: Tensor | Sequence[Sequence[int]], *, salt: bytes) -> int:
        """Begin with published pages instead of computing them anew. The cache must be empty.

        Keys and values must follow from the tokens alone: what else a model was given (an image, an adapter) belongs
        into the salt.

        Args:
            token_ids: [B, T] the text that will be fed. Leave out its last token if its logits are wanted: a pass must
                feed at least one.
            salt: who may share; what was published under another salt is not found.
        Returns: cells found, a multiple of `page_size`, the same in every row. `length` is that number; feed the rest.
        Raises: CacheError if the cache is not empty or has slots without pages; InputError for a wrong argument.
        """
        self._shareable("adopt_prefix")
        if self.length or self._step is not None:
            raise CacheError(
                f"A cache that holds {self.length} cells cannot adopt a prefix.",
                why="a prefix begins the text, and a pass under way has begun it already.",
                fix="Call it on a new cache, or after `reset`.",
                layout=self.layout,
                operation="adopt_prefix",
            )
        chains = [self.prefixes.digests(row, salt) for row in self._rows_of(token_ids)]
        found = [self.prefixes.find(chain) for chain in chains]
        size = self.prefixes.page_size
        count = min(map(len, found))
        while count and not all(self._suffices(entries[:count]) for entries in found):
            count -= 1
        if not count:
            return 0
        for group, table in enumerate(self.tables):
            start = table.reach.first_read(count * size) // size
            pages = [[cast(int, entry[group]) for entry in entries[start:count]] for entries in found]
            table.adopt(pages, start * size, count * size)
        for chain in chains:
            self.prefixes.touch(chain[:count])
        self.cells.commit(count * size, dense=True, prefix=None, segmented=False)
        self._settle()
        self._measure_room()
        return count * size

    def publish(self, token_ids: Tensor | Sequence[Sequence[int]], *, salt: bytes) -> int:
        """Let later caches of this layout adopt the full pages of what is held.

        Args:
            token_ids: [B, T] the tokens of the first T cells; T is at most `length`.
            salt: as in `adopt_prefix`.
        Returns: cells of the row that is known least far. Fewer than T where a page is not full, where rows have
            padding or holes, and where the option `shared_pages` is less.
        Raises: CacheError if keys and values follow from more than the tokens before; InputError for a wrong argument.
        """
        self._shareable("publish")
        if self.cells.segmented or self.cells.prefix is not None:
            raise CacheError(
                "The keys and values of this cache follow from more than the tokens before them.",
                why="its passes had segments or prefix lengths.",
                fix="Publish caches of plain causal texts only.",
                layout=self.layout,
                operation="publish",
            )
        rows, size = self._rows_of(token_ids), self.prefixes.page_size
        if any(len(row) > self.length for row in rows):
            raise InputError(
                f"There are more tokens than the {self.length} cells of the cache.",
                fix="Publish the tokens that were fed.",
                argument="token_ids",
            )
        known = []
        for b, row in enumerate(rows):
            chain = self.prefixes.digests(row[: self.cells.dense_length], salt)
            entries: list[Entry] = [
                tuple(table.page_of(b, page * size) for table in self.tables) for page in range(len(chain))
            ]
            known.append((chain, self.prefixes.publish(chain, entries)))
        return min(len(self.prefixes.find(chain)) for chain, _ in known) * size

    def _suffices(self, entries: Sequence[Entry]) -> bool:
        """Whether every table has the pages that the token after these would read."""
        size = self.prefixes.page_size
        starts = [table.reach.first_read(len(entries) * size) // size for table in self.tables]
        return all(entry[group] is not None for group, start in enumerate(starts) for entry in entries[start:])

    def _shareable(self, operation: str) -> None:
        other = [f"slot {i}: {slot.kind}" for i, slot in enumerate(self.slots) if slot.kind in ("latent", *_FIXED)]
        if other:
            raise CacheError(
                f"A cache of this model cannot {operation}.",
                why=f"what some slots keep is not in pages ({', '.join(other)}).",
                fix="Fork a cache that holds the prefix instead.",
                layout=self.layout,
                operation=operation,
            )

    def _rows_of(self, token_ids: Tensor | Sequence[Sequence[int]]) -> list[list[int]]:
        rows = token_ids.tolist() if isinstance(token_ids, Tensor) else [list(row) for row in token_ids]
        whole = all(isinstance(row, list) and all(type(token) is int for token in row) for row in rows)
        if not whole or len(rows) != self.batch_size or len({len(row) for row in rows}) != 1:
            raise InputError(
                f"token_ids must be whole numbers [{self.batch_size}, T], as many in every row.",
                fix="Give the tokens of every row; adopt ragged prompts one row at a time, before they are joined.",
                argument="token_ids",
            )
        return rows


_FIXED = ("state", "cross")


class Paged(Layout):
    """Pages of equal size, shared between rows, forks and caches.

    Latents are kept as in `dynamic`: latent attention reads no pages.

    Options: page_size: cells of a page. slack: as in `hybrid`. shared_pages: published stretches of `page_size` tokens
    that are kept for later caches.

    Attributes:
        pools: for each reach; all caches of this layout share them, so they are used by one thread at a time.
        prefixes: what was published.
    """

    options = {"page_size": (16, 1), "shared_pages": (1024, 0), "slack": (64, 0)}  # noqa: RUF012 - ClassVar in Layout

    def __init__(self, name: str, request: CacheRequest) -> None:
        self.view = next((view for view in request.views if view in VIEWS), "dense")
        super().__init__(name, request)
        groups: dict[Reach, dict[int, KVSlot]] = {}
        for i, slot in enumerate(self.slots):
            if isinstance(slot, KVSlot):
                groups.setdefault(Reach.of(slot), {})[i] = slot
        size = int(self.settings["page_size"])
        self.pools = {reach: PagePool(slots, size, self.dtype, self.device) for reach, slots in groups.items()}
        self.prefixes = Prefixes(
            tuple(self.pools.values()), size, int(self.settings["shared_pages"]),
            f"{request.dtype}\0{describe(self.slots)}",
        )  # fmt: skip

    def refusals(self) -> list[str]:
        """As in `Layout`; the encoder's keys are dense whatever the view."""
        reasons = super().refusals()
        crossed = any(isinstance(slot, CrossSlot) for slot in self.slots)
        if crossed and self.view == "paged" and "dense" not in self.request.views:
            reasons.append("it keeps the encoder's keys dense, and the attention backend reads only pages")
        return reasons

    def new(self, *, batch_size: int, capacity: int | None = None) -> PagedCache:
        """An empty cache; it takes pages as they are needed, so `capacity` only bounds spare room of other slots."""
        plain = super().new(batch_size=batch_size, capacity=capacity)  # checked, with every slot that has no pages
        slack = int(self.settings["slack"])
        tables = {
            reach: PageTable(pool, reach, slack, [[] for _ in range(batch_size)]) for reach, pool in self.pools.items()
        }
        stores = [
            PagedStore(i, slot, tables[Reach.of(slot)], dense=self.view == "dense")
            if isinstance(slot, KVSlot)
            else plain._stores[i]
            for i, slot in enumerate(self.slots)
        ]
        return PagedCache(
            self.name, self.slots, stores, self.operations, batch_size=batch_size, device=self.device,
            streams=self.streams, tables=tuple(tables.values()), prefixes=self.prefixes,
        )  # fmt: skip
