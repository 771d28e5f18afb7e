"""Slots of keys and values in pages. What concerns pages and rows, the group's table does once for all its slots."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from pluglm.contracts import DenseView, KVSlot, PagedView
from pluglm_caches.cells import Cells
from pluglm_caches.paged_table import PageTable
from pluglm_caches.stores import Pass, wrong_shape
from pluglm_caches.tokens import TokenStore


class PagedStore(TokenStore):
    """One attention layer's keys and values, in the pages of `table`. It has no tensors of its own.

    Args:
        index: the slot's number. slot: its sizes.
        dense: hand out gathered tensors, for backends that do not read pages.
    """

    kind = "kv"
    axis = 2
    names = ("k", "v")

    def __init__(self, index: int, slot: KVSlot, table: PageTable, *, dense: bool) -> None:
        # Not TokenStore.__init__: it keeps two tensors with a row for each sequence, and here the pool keeps pages.
        self.index, self.slot, self.table, self.dense = index, slot, table, dense

    @property
    def first(self) -> int:  # type: ignore[override]    # the table's, which all slots of a group share
        """The first cell that a view can hand out."""
        return self.table.first

    @property
    def room(self) -> int:  # type: ignore[override]    # the same
        """The cell up to which a pass may write."""
        return self.table.room

    def begin(self, cells: Cells, count: int) -> None:
        self.table.begin(cells, count)

    def seen_from(self, current: Pass) -> int:
        """The page with the first cell that is read. All, if the cells are not dense: a mask hides the rest."""
        first, reach = self.table.first, self.table.reach
        if not current.dense or reach.cells is None:
            return first
        size, read = self.table.pool.page_size, current.cells.first_read(reach.window, reach.chunk)
        return first + max(0, read - first) // size * size

    def write(self, k: Tensor, v: Tensor, current: Pass) -> DenseView | PagedView:
        """Check both tensors, then write both."""
        pool, slot = self.table.pool, self.slot
        for name, given, size in (("k", k, slot.head_dim), ("v", v, slot.v_head_dim)):
            wanted = (len(self.table.rows), slot.num_kv_heads, current.count, size)
            dtype = pool.k[self.index].dtype
            if given.shape != wanted or given.dtype is not dtype:
                raise wrong_shape(name, given, wanted, dtype)
        where = self.table.where(current.start, current.count)
        for pages, given in ((pool.k[self.index], k), (pool.v[self.index], v)):
            pages.flatten(0, 1).index_copy_(0, where, given.transpose(1, 2).flatten(0, 1))  # [B * T, K, D]
        return self.read(self.seen_from(current), current.end)

    def read(self, start: int, end: int) -> DenseView | PagedView:
        """The pages, or what they hold gathered; `start` begins a page."""
        view = self._view(start, end)
        return DenseView(*view.dense()) if self.dense else view

    def tensors(self) -> list[Tensor]:
        """The pool's: a pool that several caches share counts in each of them."""
        return [self.table.pool.k[self.index], self.table.pool.v[self.index]]

    def take_rows(self, index: Tensor, held: int) -> None:
        """The cache has the table do it, once for all slots."""

    def copy(self) -> PagedStore:
        """Of the same table, which the cache replaces by its copy."""
        return PagedStore(self.index, self.slot, self.table, dense=self.dense)

    def settle(self, cells: Cells) -> None:
        self.table.settle(cells)

    def lacks(self, cells: Cells, length: int) -> bool:
        return self.table.lacks(cells, length)

    def crop(self, length: int) -> None:
        self.table.crop(length)

    def forget(self) -> None:
        self.table.forget()

    def saved(self, held: int) -> dict[str, Tensor]:
        known = self.table.held - self.table.first
        k, v = self._view(self.table.first, held).dense()
        return {"k": k[:, :, known:], "v": v[:, :, known:]}

    def misfit(self, tensors: Mapping[str, Tensor], rows: int, held: int) -> str:
        if set(tensors) != set(self.names):
            return f"it has {sorted(tensors)} and needs {sorted(self.names)}"
        cells = tensors["k"].shape[2] if tensors["k"].ndim == 4 else -1
        # How few a window needs follows from positions. A file for an equal slot holds what its window reads.
        if not (held if self.table.reach.cells is None else 0) <= cells <= held:
            return f"it holds {cells} of {held} cells, and this layout needs more of them"
        dtype = self.table.pool.k[self.index].dtype
        for name, size in (("k", self.slot.head_dim), ("v", self.slot.v_head_dim)):
            wanted = [rows, self.slot.num_kv_heads, cells, size]
            if list(tensors[name].shape) != wanted or tensors[name].dtype is not dtype:
                return f"{name} is {list(tensors[name].shape)} {tensors[name].dtype}, not {wanted} {dtype}"
        return ""

    def restore(self, tensors: Mapping[str, Tensor], held: int) -> None:
        table, pool = self.table, self.table.pool
        table.open(held - tensors["k"].shape[2], held)
        count = held - max(table.first, held - tensors["k"].shape[2])
        where = table.where(held - count, count)
        for pages, saved in ((pool.k[self.index], tensors["k"]), (pool.v[self.index], tensors["v"])):
            kept = saved[:, :, saved.shape[2] - count :].to(pages.device)
            pages.flatten(0, 1).index_copy_(0, where, kept.transpose(1, 2).flatten(0, 1))

    def _view(self, start: int, end: int) -> PagedView:
        k, v = self.tensors()
        if k.requires_grad or v.requires_grad:  # aliases: the graph must outlive the pass, which cuts it off the pool
            k, v = k.view_as(k), v.view_as(v)
        return PagedView(k, v, *self.table.block(start, end), end - start)
