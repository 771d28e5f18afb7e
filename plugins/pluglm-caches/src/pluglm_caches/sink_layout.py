"""The layout `sink`: texts of any length in constant memory, by attention sinks and a window.

Source: Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", section 3.2.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from pluglm_blocks.rope import refusals as rope_refusals
from pluglm_blocks.rope_kinds import KINDS
from torch import Tensor

from pluglm.contracts import CacheRequest, KVSlot, Rope
from pluglm.errors import CacheError, ContextLengthError, InputError
from pluglm_caches.cache import CachePass, SlotCache
from pluglm_caches.layout import Layout
from pluglm_caches.sinks import Sinks, SinkStore
from pluglm_caches.stores import Store
from pluglm_caches.windows import WindowStore

_SINKS, _WINDOW, _LEAST = 4, 1020, 2  # as in the paper's tables; a window holds the query and a key


class SinkCache(SlotCache):
    """See `SlotCache`. Finds every row's sinks before a pass that no longer sees all of the text between.

    Args:
        sinks: the books. max_seq_len: distances that the model was made for; None: any.
    """

    def __init__(self, *args: Any, sinks: Sinks, max_seq_len: int | None, **how: Any) -> None:
        super().__init__(*args, **how)
        self.sinks, self.max_seq_len = sinks, max_seq_len
        self._sunk = [store for store in self._stores if isinstance(store, SinkStore)]

    @property
    def nbytes(self) -> int:
        """Bytes of storage held, spare room included."""
        return super().nbytes + sum(tensor.untyped_storage().nbytes() for tensor in self.sinks.tensors())

    def begin(
        self,
        positions: Tensor,
        *,
        dense: bool = False,
        prefix_lengths: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> CachePass:
        """As in the contract.

        Raises: ContextLengthError if the pass alone reaches further than the model's context; InputError for packed
            sequences of which something would be evicted.
        """
        count = positions.shape[-1]
        self._check_reach(count)
        self._find_sinks(count, segmented=segments is not None or self.cells.segmented)
        return super().begin(positions, dense=dense, prefix_lengths=prefix_lengths, segments=segments)

    def _check_reach(self, count: int) -> None:
        """The furthest key that a query of the pass sees must be within the model's context."""
        start, limit = self.sinks.start(self.length, count), self.max_seq_len
        reach = self.length + count - max(0, start - self.sinks.num)
        if limit is not None and reach > limit:
            raise ContextLengthError(
                f"A pass of {count} tokens reaches over {reach}, the model's context is {limit}.",
                why="a pass sees all of itself and the sinks; only between passes is old text forgotten.",
                fix=f"Feed the text in passes of at most {limit - self.sinks.num} tokens (prefill_chunk_size does so).",
                tokens=reach,
                limit=limit,
            )

    def _find_sinks(self, count: int, *, segmented: bool = False) -> None:
        """Set them aside if a pass of `count` tokens needs them, or may drop the cells between."""
        evicts = self.sinks.start(self.length, count) > self.sinks.num
        if not self._sunk or not (evicts or self._sunk[0].first):
            return
        if segmented:
            raise InputError(
                "Packed sequences are longer than what a cache with sinks keeps.",
                why="positions go back where a segment begins, so what to evict is not known.",
                fix='Give each sequence a row of its own, raise the option "window", or choose cache="dynamic".',
                argument="segments",
            )
        if not self.sinks.complete:
            index = self.sinks.find(self.cells, self._sunk[0].first, self.length)
            for store in self._sunk:
                store.set_aside(index, self.length)

    def _settle(self) -> None:
        """Sinks are found before the stores give back what a long pass needed."""
        super()._settle()
        if self.length and not self.cells.segmented:
            self._find_sinks(1)

    def _check_held(self, operation: str, length: int) -> None:
        """As in the base class; then everything is held, or the sinks are older than what is taken back."""
        super()._check_held(operation, length)
        if length < self.sinks.extent:
            self._forget_sinks()

    def _forget_sinks(self) -> None:
        self.sinks.forget()
        for store in self._sunk:
            store.kept = None

    def select(self, index: Tensor) -> None:
        """Keep these rows. A new number of rows means new storage."""
        super().select(index)
        self.sinks.take_rows(index.to(self.cells.device))

    def fork(self) -> SinkCache:
        """A deep copy, made now."""
        twin = cast(SinkCache, super().fork())
        twin.sinks = self.sinks.copy()
        twin._sunk = [store for store in twin._stores if isinstance(store, SinkStore)]
        for store in twin._sunk:
            store.sinks = twin.sinks
        return twin

    def reset(self) -> None:
        """Forget all tokens, sinks included; keep the storage."""
        super().reset()
        self._forget_sinks()

    def load(self, *args: Any, **named: Any) -> None:
        """As in the base class. Raises CacheError, and is empty, if slots of the file hold different cells."""
        super().load(*args, **named)
        if len({store.first for store in self._sunk}) > 1:
            self.reset()
            raise CacheError(
                "The file's slots hold different cells.",
                why="all slots of a cache with sinks forget at the same time.",
                fix="Save the cache again with `cache.save`, or prefill the prompt anew.",
                layout=self.layout,
                operation="load",
            )


class Sink(Layout):
    """The first `sinks` tokens of every row and the last `window` ones, in each slot of keys and values.

    A slot with a window of its own keeps what this reads, as in `hybrid`: the model was trained without the rest.

    Options: sinks: kept tokens at the beginning. window: kept tokens at the end; what the model's context leaves, if
    that is less than the default and nothing is said. slack: tokens that can always be taken back.
    """

    kinds = ("cross", "kv", "shared", "state", "window")
    streams = True
    options = {"sinks": (_SINKS, 1), "window": (_WINDOW, _LEAST), "slack": (64, 0)}  # noqa: RUF012 - declared ClassVar

    def __init__(self, name: str, request: CacheRequest) -> None:
        super().__init__(name, request)
        self.settings |= self._sizes()
        ropes = dict.fromkeys(
            rope for i, rope in enumerate(request.rotations or ()) if rope is not None and self._moves(i)
        )
        self._turns = {rope: number for number, rope in enumerate(ropes)}
        # Speeds alone: a kind's attention factor is in the keys already.
        self._speeds = tuple(_speeds(rope).to(self.device) for rope in ropes)

    def _sizes(self) -> dict[str, int]:
        """Sinks and window, the latter as large as the context allows if the user said nothing."""
        given, limit = dict(self.request.options), self.request.max_seq_len
        sinks, window = int(given.get("sinks", _SINKS)), int(given.get("window", _WINDOW))
        if "window" not in given and limit is not None:
            window = min(window, limit - sinks)
        return {"sinks": sinks, "window": window}

    def refusals(self) -> list[str]:
        """As in `Layout`; and what cannot be moved."""
        reasons, request = super().refusals(), self.request
        if request.rotations is None:
            reasons.append("the model has no program, so nobody knows how its keys are rotated and the sinks to move")
        if request.learned_positions:
            reasons.append("the model has learned positions, which are in the token vectors and cannot be moved")
        for i, rope in enumerate(request.rotations or ()):
            if rope is None or not self._moves(i):
                continue
            if why := rope_refusals(rope):
                reasons += [f"slot {i}: {reason}" for reason in why]
            elif KINDS[rope.kind].compute(rope, dict(rope.parameters)).limit is not None:
                reasons.append(f"slot {i} has rope {rope.kind!r}, whose speeds depend on the length of the text")
        if not any(self._misfit(name, value) for name, value in request.options):
            sizes, limit = self._sizes(), request.max_seq_len
            if limit is not None and (sizes["window"] < _LEAST or sum(sizes.values()) > limit):
                reasons.append(
                    f"its options sinks and window are {sizes['sinks']} and {sizes['window']}, "
                    f"and the model's context of {limit} must hold both"
                )
        return reasons

    def _moves(self, slot: int) -> bool:
        kept = self.slots[slot]
        return isinstance(kept, KVSlot) and kept.window is None

    def new(self, *, batch_size: int, capacity: int | None = None) -> SinkCache:
        """An empty cache. `capacity` only bounds spare room while the text is short."""
        super().new(batch_size=batch_size, capacity=capacity)  # checks both
        sinks = Sinks(self.settings["sinks"], self.settings["window"], self._speeds)
        stores = [
            self._sink_store(i, slot, sinks, batch_size, capacity)
            if isinstance(slot, KVSlot)
            else self._store(slot, batch_size, capacity)
            for i, slot in enumerate(self.slots)
        ]
        return SinkCache(
            self.name, self.slots, stores, self.operations, batch_size=batch_size, device=self.device, streams=True,
            sinks=sinks, max_seq_len=self.request.max_seq_len,
        )  # fmt: skip

    def _sink_store(self, i: int, slot: KVSlot, sinks: Sinks, rows: int, capacity: int | None) -> Store:
        slack = int(self.settings["slack"])
        if not self._moves(i):
            return WindowStore.of(slot, rows, self.dtype, self.device, slack=slack, hint=capacity)
        rope = (self.request.rotations or ())[i]
        return SinkStore.over(
            sinks, slot, rows, self.dtype, self.device, slack=slack, hint=capacity,
            turn=None if rope is None else self._turns[rope], interleaved=rope is not None and rope.interleaved,
        )  # fmt: skip


def _speeds(rope: Rope) -> Tensor:
    with torch.device("cpu"), torch.inference_mode(False):
        return KINDS[rope.kind].compute(rope, dict(rope.parameters)).short
