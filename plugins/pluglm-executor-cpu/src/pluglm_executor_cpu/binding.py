"""A cache's storage as the library sees it: bound once, and looked at for one slot a geometry in every pass.

Only `Cache.begin`, `read`, `commit` and `Step.keys` are used. In a pass, `read` hands out the cells of the pass as
well: whoever writes those cells has appended. That holds for a layout that stores what it is given and hands out slices
of it; `writes_in_place` finds out whether a layout does.

Addresses are kept from pass to pass. A tensor that was bound is not let go before it is bound anew, so no other storage
can have come to lie at its address: an address within it proves that it is still in use. Slots of one geometry (same
slot, shape, strides and place in their storage) are replaced together: what is checked for one holds for all. If ever
it did not, the library would write to a tensor that nobody reads, and not to memory that is somebody else's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pluglm.contracts import Cache, CacheLayout, DenseView, KVSlot, Slot, Step
from pluglm_executor_cpu import native

#: Cells that a layout is tried with: more than one block or page of any layout, and then some, one by one.
_TRIED, _TRIED_SINGLY = 130, 3


def dense(view: Any) -> tuple[Tensor, Tensor] | None:
    """k and v of a view that the library can read; None: it cannot."""
    if not isinstance(view, DenseView):
        return None
    for tensor in (view.k, view.v):
        known = str(tensor.dtype).removeprefix("torch.") in native.DTYPES
        if not known or tensor.device.type != "cpu" or tensor.stride(3) != 1:
            return None
    return (view.k, view.v) if view.k.dtype is view.v.dtype else None


def _place(k: Tensor, v: Tensor) -> tuple[Any, ...]:
    return (
        k.shape, v.shape, k.stride(), v.stride(), k.storage_offset(), v.storage_offset(), k.dtype,
        k.untyped_storage().nbytes(), v.untyped_storage().nbytes(),
    )  # fmt: skip


class _Geometry:
    """Slots that lie alike in storages of their own; the first stands for all.

    Attributes:
        slot: the first. k, v: what was bound, kept alive. group: the library's books of it.
    """

    def __init__(self, slot: int, k: Tensor, v: Tensor, group: native.Group) -> None:
        self.slot, self.k, self.v, self.group = slot, k, v, group
        self._k, self._v = k.data_ptr(), v.data_ptr()
        self._strides, self._rows = (k.stride(), v.stride()), k.shape[:2]
        size = k.element_size()
        self._k_cell, self._v_cell = k.stride(2) * size, v.stride(2) * size
        storage = k.untyped_storage()
        self._from, self._to = storage.data_ptr(), storage.data_ptr() + storage.nbytes()

    @property
    def spare(self) -> int:
        """Cells behind the pass's own that the bound tensors have room for; too few where that cannot be told."""
        shape, strides, cell = self.k.shape, self.k.stride(), self.k.stride(2)
        # From the beginning of the first head to that of the next, or to the end.
        heads = [stride for size, stride in zip(shape[:2], strides[:2], strict=True) if size > 1 and stride > 0]
        size = min([(self._to - self._from) // self.k.element_size(), *heads])
        return (size - self.k.storage_offset()) // cell - int(self.group.shift + self.group.length)

    def follow(self, cache: Cache, step: Step) -> bool:
        """Note which cells this pass hands out. False: they lie elsewhere now."""
        view: Any = cache.read(self.slot, step)
        k, v = view.k, view.v
        at = k.data_ptr()
        shift, rest = divmod(at - self._k, self._k_cell)
        same = (
            self._from <= at < self._to
            and rest == 0
            and v.data_ptr() - self._v == shift * self._v_cell
            and (k.stride(), v.stride()) == self._strides
            and k.shape[:2] == self._rows
        )
        if not same:
            return False
        keys, group = step.keys(self.slot), self.group
        group.shift, group.length = shift, keys.length
        if keys.start is not None:
            group.start = keys.start
            return True
        positions = keys.positions
        if positions.stride(1) != 1 or positions.dtype is not torch.int64:
            positions = positions.long().contiguous()
        self._positions = positions  # alive until the pass is over
        group.start, group.positions = -1, positions.data_ptr()
        group.positions_row = positions.stride(0) if positions.shape[0] > 1 else 0
        return True


class Binding:
    """One cache's slots, as of the last time that any of them moved."""

    def __init__(self, slots: Sequence[Slot], sources: Sequence[int]) -> None:
        """slots: those of the program. sources: which of them hold keys."""
        self._expected, self._sources = slots, sources
        self.slots = (native.Slot * len(slots))()
        self.groups = (native.Group * len(slots))()
        self._geometries: list[_Geometry] = []
        self._held: list[tuple[Tensor, Tensor]] = []
        self._spare, self._spare_behind = 0, -1

    @property
    def num_groups(self) -> int:
        """How many entries of `groups` are in use."""
        return len(self._geometries)

    @property
    def lengths(self) -> list[int]:
        """Of each geometry, how many cells the pass hands out; a part of the pass may be told fewer."""
        return [geometry.group.length for geometry in self._geometries]

    @lengths.setter
    def lengths(self, lengths: Sequence[int]) -> None:
        for geometry, length in zip(self._geometries, lengths, strict=True):
            geometry.group.length = length

    def spare(self, length: int) -> int:
        """Cells that every slot has room for behind the first `length`, without being moved; 0: not known."""
        return self._spare if length == self._spare_behind else 0

    def measure(self, length: int) -> None:
        """Have `spare` known. length: cells of the cache that are the last pass's or before it."""
        self._spare, self._spare_behind = max(0, min(geometry.spare for geometry in self._geometries)), length

    def again(self, cache: Cache, step: Step) -> bool:
        """Bring the books up to a shorter pass in place of the last one. False: it does not begin where that did."""
        before = [geometry.group.shift for geometry in self._geometries]
        same = all(geometry.follow(cache, step) for geometry in self._geometries)
        return same and before == [geometry.group.shift for geometry in self._geometries]

    def follow(self, cache: Cache, step: Step) -> bool:
        """Bring the books up to this pass. False: the cache hands out what the library cannot write in place."""
        if self._geometries and all(geometry.follow(cache, step) for geometry in self._geometries):
            return True
        return self._bind(cache, step) and all(geometry.follow(cache, step) for geometry in self._geometries)

    def _bind(self, cache: Cache, step: Step) -> bool:
        known: dict[tuple[Any, ...], int] = {}
        old = self._geometries, self._held
        self._geometries, self._held = [], []
        if len(cache.slots) != len(self._expected):
            return False
        for i in self._sources:
            tensors = dense(cache.read(i, step))
            again = dense(cache.read(i, step))
            same = tensors is not None and again is not None and tensors[0].data_ptr() == again[0].data_ptr()
            if tensors is None or not same or not self._fits(i, *tensors, cache.batch_size):
                self._geometries = []
                return False
            k, v = tensors
            self._held.append(tensors)
            key = (cache.slots[i], *_place(k, v))
            if key not in known:
                known[key] = len(self._geometries)
                self._geometries.append(_Geometry(i, k, v, self.groups[known[key]]))
            self.slots[i] = native.Slot(
                k.data_ptr(), v.data_ptr(), *k.stride()[:3], *v.stride()[:3],
                native.DTYPES[str(k.dtype).removeprefix("torch.")], known[key],
            )  # fmt: skip
        del old  # the former storages live until here
        return True

    def _fits(self, i: int, k: Tensor, v: Tensor, rows: int) -> bool:
        """Whether the tensors have the sizes that the program says: a cache may be another model's."""
        slot = self._expected[i]
        if not isinstance(slot, KVSlot):
            return False
        sizes = ((k, slot.head_dim), (v, slot.v_head_dim))
        return all(t.shape[:2] == (rows, slot.num_kv_heads) and t.shape[3] == size for t, size in sizes)


def writes_in_place(layout: CacheLayout, sources: Sequence[int]) -> bool:
    """Whether caches of a layout hand out slices of what `append` writes: found out by appending to one."""
    if layout.streams:
        return False  # it may move what it holds as it is handed out
    cache = layout.new(batch_size=1, capacity=_TRIED + _TRIED_SINGLY)
    positions = torch.arange(_TRIED + _TRIED_SINGLY, device="cpu")[None]
    with torch.no_grad():
        for count in (_TRIED, *[1] * _TRIED_SINGLY):
            at = cache.length
            step = cache.begin(positions[:, at : at + count], dense=True)
            if not all(_written(cache, step, slot, count) for slot in sources):
                return False
            cache.commit(step)
    return True


def _written(cache: Cache, step: Step, slot: int, count: int) -> bool:
    """Append ones to a slot; whether they appear where `read` pointed, and nothing else has moved."""
    kept = cache.slots[slot]
    before = dense(cache.read(slot, step))
    if before is None or not isinstance(kept, KVSlot):
        return False
    old = [tensor[:, :, :-count].clone() for tensor in before]
    shape = (1, kept.num_kv_heads, count)
    k, v = (torch.ones(*shape, size, dtype=before[0].dtype, device="cpu") for size in (kept.head_dim, kept.v_head_dim))
    after = dense(cache.append(slot, k, v, step))
    return after is not None and all(
        a.data_ptr() == b.data_ptr()
        and a.stride() == b.stride()
        and a.shape == b.shape
        and bool((b[:, :, -count:] == 1).all())
        and torch.equal(b[:, :, :-count], kept_before)
        for a, b, kept_before in zip(before, after, old, strict=True)
    )
