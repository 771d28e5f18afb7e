"""One batch's keys, values and states: the `Cache` of every layout here, a list of stores with common books.

A pass writes into spare room behind the cells that count; `commit` moves the border. So a pass that fails costs
nothing, and appending one token copies that token and nothing else. Where the room ends, each store makes some in its
own way; a cache with a capacity refuses before anything is written. A layout is the choice of a store for each slot.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import Tensor

from pluglm.contracts import KeyInfo, KVView, SharedSlot, Slot, Step
from pluglm.errors import InputError
from pluglm_caches import refusals
from pluglm_caches.cells import Cells
from pluglm_caches.saving import read_saved, write_saved
from pluglm_caches.states import CrossStore, StateStore, clone
from pluglm_caches.stores import Store
from pluglm_caches.tokens import TokenStore


class CachePass:
    """One pass's reservation: the cells [start, start + count)."""

    __slots__ = ("_cache", "_infos", "cell", "cells", "count", "dense", "end", "prefix", "segmented", "start")

    def __init__(
        self, cache: SlotCache, start: int, count: int, *, dense: bool, prefix: Tensor | None, segmented: bool
    ) -> None:
        self._cache, self.cells, self.start, self.count, self.end = cache, cache.cells, start, count, start + count
        self.dense, self.prefix, self.segmented = dense, prefix, segmented
        self._infos: dict[int, KeyInfo] = {}
        # Found out here for all slots: in each of them it would be one more call.
        alone = count == 1 and not torch.is_grad_enabled()
        self.cell = cache.cells.ramp(start, start + 1)[0] if alone else None

    def keys(self, slot: int) -> KeyInfo:
        """What a slot hands out; one object for all slots that hand out the same cells."""
        store = self._cache.store(slot)
        if (own := store.keys(self)) is not None:
            return own
        first = store.seen_from(self)
        if first not in self._infos:
            self._infos[first] = self.cells.info(
                first, self.end, self.count,
                dense=self.dense, prefix=self.prefix, segmented=self.segmented,
            )  # fmt: skip
        return self._infos[first]


class SlotCache:
    """See `pluglm.contracts.Cache`; this says only what is particular.

    Gradients flow within a pass and are cut off between passes. An operation on the cache discards a pass under way.
    """

    def __init__(
        self,
        layout: str,
        slots: tuple[Slot, ...],
        stores: list[Store],
        operations: frozenset[str],
        *,
        batch_size: int,
        device: torch.device,
        capacity: int | None = None,
        streams: bool = False,
    ) -> None:
        self.layout, self.slots, self.operations = layout, slots, operations
        self.capacity, self.batch_size, self.streams = capacity, batch_size, streams
        #: Slots that are not appended to and have no keys of a pass.
        self.keyless = frozenset(i for i, slot in enumerate(slots) if slot.kind in ("state", "cross"))
        self.cells = Cells(batch_size, capacity or 0, device)
        self.length = 0  # always `cells.length`, as `dense` is always what `cells` knows
        self.dense = True
        self._stores = stores
        self._fixed = [stores[i] for i in sorted(self.keyless)]
        self._tokens = [store for store in stores if isinstance(store, TokenStore)]
        self._room = 0  # the cell up to which every store has room
        self._step: CachePass | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of storage held, spare room included."""
        tensors = [*self.cells.tensors(), *(t for store in self._stores for t in store.tensors())]
        return sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    def next_positions(self, count: int) -> Tensor:
        """[1, T] while every pass was dense, then [B, T]."""
        return self.cells.next(count)

    # A pass

    def begin(
        self,
        positions: Tensor,
        *,
        dense: bool = False,
        prefix_lengths: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> CachePass:
        """Reserve cells for positions [B, T] or [1, T]. Discards a pass that was begun and not committed."""
        cells = self.cells
        self._discard()
        count = self._checked(positions, "positions")
        start = cells.length
        if start + count > self._room:
            self._make_room(count)
        dense = cells.write(positions, count, dense=dense)
        if segments is not None or cells.segmented:
            self._write_segments(segments, count)
        prefix = cells.prefix
        if prefix_lengths is not None:
            prefix = clone(prefix_lengths.to(cells.device))
        segmented = segments is not None
        step = self._step = CachePass(self, start, count, dense=dense, prefix=prefix, segmented=segmented)
        return step

    def append(self, slot: int, k: Tensor, v: Tensor, step: Step) -> KVView:
        """Write this pass's keys and values; the views are slices of the storage."""
        current = self._step
        if step is not current or current is None:
            raise refusals.stale(self.layout, "append")
        view: KVView = self._stores[slot].write(k, v, current)
        return view

    def read(self, slot: int, step: Step | None = None) -> KVView:
        """All keys of a slot without writing: those of the pass `step`, or the committed ones.

        A `SharedSlot` gives its source's, so in a pass the source must have been appended to.
        """
        if step is not None and step is not self._step:
            raise refusals.stale(self.layout, "read")
        store = self.store(slot)
        if step is None or self._step is None:
            view: KVView = store.committed(self.length)
        else:
            view = store.seen(self._step)
        return view

    def store(self, slot: int) -> Store:
        """What holds the keys that a slot hands out. Raises InputError for a slot without keys of a pass."""
        if slot in self.keyless:
            raise InputError(
                f"Slot {slot} hands out no keys of a pass.", fix="Use `cross` or `state`.", argument="slot"
            )
        kept = self.slots[slot]
        return self._stores[kept.source if isinstance(kept, SharedSlot) else slot]

    def cross(self, slot: int) -> tuple[KVView, KeyInfo] | None:
        """The encoder's keys of a cross slot, or None before `set_cross`."""
        store = self._stores[slot]
        if not isinstance(store, CrossStore):
            raise refusals.wrong_slot(slot, self.slots[slot].kind, "cross")
        return store.get()

    def set_cross(self, slot: int, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Write a cross slot, once; in a pass it counts when the pass commits."""
        store = self._stores[slot]
        if not isinstance(store, CrossStore):
            raise refusals.wrong_slot(slot, self.slots[slot].kind, "cross")
        store.set(k, v, positions, rows=self.batch_size, in_pass=self._step is not None)

    def state(self, slot: int) -> dict[str, Tensor]:
        """In a pass: the tensors to update in place. Outside: copies to look at."""
        store = self._stores[slot]
        if not isinstance(store, StateStore):
            raise refusals.wrong_slot(slot, self.slots[slot].kind, "state")
        if self._step is None:
            return {name: clone(tensor) for name, tensor in store.states.items()}
        return store.opened()

    def commit(self, step: Step) -> None:
        """Make the pass count."""
        current = self._step
        if current is None or step is not current:
            raise refusals.stale(self.layout, "commit")
        self._step = None
        end = current.end
        self.cells.commit(end, dense=current.dense, prefix=current.prefix, segmented=current.segmented)
        self._settle()
        for fixed in self._fixed:
            fixed.commit()
        if current.count > 1:
            for tokens in self._tokens:
                tokens.settle(self.cells)
            self._measure_room()
        if torch.is_grad_enabled():
            for store in self._stores:
                store.detach()

    # Operations between passes

    def crop(self, length: int) -> None:
        """Keep the first `length` cells."""
        if not 0 <= length <= self.length:
            raise InputError(f"crop({length}): the cache holds {self.length} cells.", argument="length")
        self._discard()
        if length != self.length:
            self._require("crop")
            self._check_held("crop", length)
            self._keep(length)

    def rollback(self, count: int | Tensor) -> None:
        """Take back the last cells; a tensor [B] costs one synchronisation with the device."""
        if isinstance(count, Tensor):
            counts = count.tolist() if count.shape == (self.batch_size,) else [-1]
            lowest, highest = min(counts), max(counts)
        else:
            lowest = highest = count
        if lowest < 0 or highest > self.length:
            raise InputError(
                f"rollback({count}) makes no sense.",
                why=f"the cache has {self.length} cells in each of {self.batch_size} rows.",
                fix="Give a number of cells, or a tensor with one for each row.",
                argument="count",
            )
        self._discard()
        if not highest:
            return
        self._require("rollback")
        self._check_held("rollback", self.length - highest)
        if isinstance(count, Tensor) and lowest != highest:
            self.cells.punch(count, highest)
        self._keep(self.length - lowest)

    def reorder(self, index: Tensor) -> None:
        """Row i becomes what row index[i] was, in the same storage."""
        if index.shape != (self.batch_size,):
            raise InputError(
                f"reorder takes one row number for each of {self.batch_size} rows, not {list(index.shape)}.",
                fix="Use `select` to change the number of rows.",
                argument="index",
            )
        self.select(index)

    def select(self, index: Tensor) -> None:
        """Keep these rows. A new number of rows means new storage."""
        if index.dim() != 1 or not index.shape[0] or index.dtype is not torch.int64:
            raise InputError("Row numbers must be a tensor [B] of int64, at least one.", argument="index")
        if index.device.type == "cpu" and not 0 <= int(index.min()) <= int(index.max()) < self.batch_size:
            raise InputError(f"Rows {index.tolist()} of a cache with {self.batch_size}.", argument="index")
        self._discard()
        index = index.to(self.cells.device)
        for store in self._stores:
            store.take_rows(index, self.length)
        self.cells.take_rows(index)
        self.batch_size = self.cells.rows

    def repeat(self, count: int) -> None:
        """Every row `count` times in a row."""
        if count < 1:
            raise InputError(f"repeat({count}): a row can be had once or more.", argument="count")
        self.select(torch.arange(self.batch_size).repeat_interleave(count))

    def fork(self) -> SlotCache:
        """A deep copy, made now; sharing storage until one side writes is what paged layouts are for."""
        twin = copy.copy(self)
        twin._stores = [store.copy() for store in self._stores]
        twin._fixed = [twin._stores[i] for i in sorted(self.keyless)]
        twin._tokens = [store for store in twin._stores if isinstance(store, TokenStore)]
        twin.cells, twin._step = self.cells.copy(), None
        return twin

    def reset(self) -> None:
        """Forget all tokens, states and the encoder's output; keep the storage."""
        self._discard()
        self._keep(0)
        for store in self._stores:
            store.forget()
        self._measure_room()

    def save(self, path: Path | str, *, fingerprint: str) -> None:
        """Write what is committed as safetensors, replacing `path` in one step."""
        write_saved(Path(path), self.slots, self._stores, self.cells, fingerprint)

    def load(self, path: Path | str, *, fingerprint: str) -> None:
        """Replace the content by a saved one, of any layout that saves plain cells. Checked before anything changes."""
        saved = read_saved(Path(path), self.slots, self._stores, fingerprint, layout=self.layout)
        if self.capacity is not None and saved.length > self.capacity:
            raise refusals.full(self.capacity, saved.length, held=0)
        self.reset()
        if saved.rows != self.batch_size:
            self.select(torch.zeros(saved.rows, dtype=torch.int64))
        saved.restore(self._stores, self.cells)
        self._settle()
        self._measure_room()

    # Inside

    def _settle(self) -> None:
        self.length, self.dense = self.cells.length, self.cells.dense_length == self.cells.length

    def _keep(self, length: int) -> None:
        self.cells.crop(length)
        for store in self._tokens:
            store.crop(length)
        self._settle()
        self._measure_room()

    def _check_held(self, operation: str, length: int) -> None:
        """Raise CacheError if a window moved on past what would be read after the first `length` cells."""
        lacking = [i for i, store in enumerate(self._stores) if store.lacks(self.cells, length)]
        if lacking:
            raise refusals.moved_on(self.layout, operation, length, lacking)

    def _checked(self, tensor: Tensor, name: str) -> int:
        if tensor.dim() != 2 or tensor.shape[0] not in (1, self.batch_size) or tensor.dtype is not torch.int64:
            raise InputError(
                f"{name} of shape {list(tensor.shape)} and {tensor.dtype} do not fit the cache.",
                why=f"they must be [{self.batch_size}, T] or [1, T], int64.",
                argument=name,
            )
        return tensor.shape[1]

    def _write_segments(self, segments: Tensor | None, count: int) -> None:
        if segments is None:
            raise InputError(
                "This pass has no segments, but the passes before had.",
                fix="Give the segment of every token, or reset the cache.",
                argument="segments",
            )
        if self._checked(segments, "segments") != count:
            raise InputError(f"segments are {list(segments.shape)} for {count} tokens.", argument="segments")
        self.cells.write_segments(segments, count)

    def _make_room(self, count: int) -> None:
        """For `count` cells more, in every store. Raises ContextLengthError before anything changes."""
        needed = self.length + count
        if self.capacity is not None and needed > self.capacity:
            raise refusals.full(self.capacity, needed, held=self.length)
        for tokens in self._tokens:
            tokens.begin(self.cells, count)
        if needed > self.cells.room:
            first, room = min(((store.first, store.room) for store in self._tokens), default=(0, None))
            self.cells.begin(first, count, room)
        self._measure_room()

    def _measure_room(self) -> None:
        self._room = min((self.cells.room, *(store.room for store in self._tokens)))

    def _discard(self) -> None:
        if self._step is not None:
            self._step = None
            for fixed in self._fixed:
                fixed.discard()

    def _require(self, operation: str) -> None:
        if operation not in self.operations:
            raise refusals.recurrent(self.layout, operation)
