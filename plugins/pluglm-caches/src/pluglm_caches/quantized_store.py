"""Slots whose old cells are packed in blocks, behind a tail of recent cells in full precision.

Blocks are only ever appended. A step of decoding writes one cell into the tail; when the tail is full, its oldest whole
blocks are packed, all at once. What a block holds follows from its own cells alone, not from when it was packed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pluglm.contracts import DenseView, KVSlot, QuantizedView
from pluglm_caches.blocks import Blocks, Codec
from pluglm_caches.cells import Cells
from pluglm_caches.stores import Pass, moved, resized, taken, zeros
from pluglm_caches.tokens import KVStore

_FIRST_ROOM = 64


class QuantizedStore(KVStore):
    """Blocks of the cells [first, base) and a dense tail from `base` on.

    Blocks lie on a grid that begins at `first`. Going back to a cell inside a block takes the block's first cells out
    of it, unpacked, into the tail; with the cells that follow they are packed anew, so these are rounded twice.

    Args:
        first, second: the tail's tensors. blocks: room for blocks.
        residual: cells that stay in the tail at least. unpacked: views are dense, made anew in every pass.
        window, chunk: as in the slot; blocks that these do not reach any more are dropped, whole.
        slack: tokens that every row can take back: what is read after that is kept, too.
    """

    kind = "quantized"

    def __init__(
        self,
        first: Tensor,
        second: Tensor,
        *,
        codec: Codec,
        blocks: Blocks,
        residual: int,
        unpacked: bool,
        window: int | None = None,
        chunk: int | None = None,
        slack: int = 0,
        hint: int | None = None,
    ) -> None:
        super().__init__(first, second, hint=hint)
        self.codec, self.blocks, self.num = codec, blocks, 0
        self.residual, self.unpacked = residual, unpacked
        self.window, self.chunk, self.slack = window, chunk, slack
        #: Cells of the tail once it is as large as it will stay: those that stay in it move once for at least half
        #: as many that are packed.
        self.size = residual + max(codec.cells, residual // 2)

    @classmethod
    def of(cls, slot: KVSlot, rows: int, codec: Codec, device: torch.device, **how: Any) -> QuantizedStore:
        """Storage for one attention layer. how: as in the class, without its window and chunk."""
        k = zeros((rows, slot.num_kv_heads, 0, slot.head_dim), codec.dtype, device)
        v = zeros((rows, slot.num_kv_heads, 0, slot.v_head_dim), codec.dtype, device)
        blocks = codec.empty(rows, 0, device)
        return cls(k, v, codec=codec, blocks=blocks, window=slot.window, chunk=slot.chunk, **how)

    @property
    def base(self) -> int:
        """The first cell of the tail."""
        return self.first + self.num * self.codec.cells

    @property
    def bounded(self) -> bool:
        """Old cells get out of reach."""
        return self.window is not None or self.chunk is not None

    @property
    def _reach(self) -> int:
        """Cells before a query that it can see at most."""
        return min(size for size in (self.window, self.chunk) if size is not None)

    # A pass

    def begin(self, cells: Cells, count: int) -> None:
        """Pack what the tail need not keep; a larger tail only while it is young, or for a long pass."""
        end = cells.length + count
        if end <= self.room:
            return
        held, needed = cells.length - self.base, end - self.base
        limit = self.size if self.hint is None or end > self.hint else min(self.size, self.hint - self.base)
        if self.one.shape[2] < limit and needed <= limit:
            self._move(0, held, min(limit, max(_FIRST_ROOM, needed + needed // 2)))
        else:
            start = self._pack(cells.length, self._first_kept(cells))
            held -= start
            self._move(start, held, max(self.size, held + count))

    def settle(self, cells: Cells) -> None:
        """Pack a long pass, and back to the constant size."""
        if self.one.shape[2] > self.size:
            held = cells.length - self.base
            start = self._pack(cells.length, self._first_kept(cells))
            self._move(start, held - start, self.size)

    def seen_from(self, current: Pass) -> int:
        """The beginning of a block, or a cell of the tail; of cells that are not dense the mask hides what it must."""
        if not self.bounded or not current.dense:
            return self.first
        start = max(self.first, current.cells.first_read(self.window, self.chunk))
        return start if start >= self.base else start - (start - self.first) % self.codec.cells

    def write(self, k: Tensor, v: Tensor, current: Pass) -> Any:
        """Write the pass into the tail, hand out what it reads."""
        self.put(k, v, current.start - self.base, current.count)
        return self.read(self.seen_from(current), current.end)

    def read(self, start: int, end: int) -> Any:
        """Blocks and tail, or both unpacked into one dense view."""
        skipped = (min(start, self.base) - self.first) // self.codec.cells
        at = max(0, start - self.base)
        k, v = (tail.narrow(2, at, end - self.base - at) for tail in (self.one, self.two))
        view = QuantizedView(self.blocks.slice(skipped, self.num - skipped), DenseView(k, v), self.codec.decode)
        if not self.unpacked:
            return view
        return view.residual if skipped == self.num else DenseView(*view.dense())

    # Blocks

    def _first_kept(self, cells: Cells) -> int:
        """What the last query read, or one before it by the slack; and as many cells as a file must hold."""
        if not self.bounded:
            return self.first
        start = cells.first_read(self.window, self.chunk, back=max(1, self.slack))
        return max(self.first, min(start, cells.length - self._reach))

    def _pack(self, length: int, start: int) -> int:
        """Pack what the tail need not keep of the cells up to `length`; drop the blocks before the cell `start`.

        Returns: how many cells the tail is rid of; the caller moves the others to its front.
        """
        size, held = self.codec.cells, length - self.base
        gone = (start - self.first) // size  # whole blocks out of reach, packed or not
        dropped, unread = min(gone, self.num), max(0, gone - self.num)
        count = max(0, (held - self.residual) // size - unread)
        tails = (tail.narrow(2, unread * size, count * size) for tail in (self.one, self.two))
        fresh = self.codec.encode(*tails) if count else None
        kept, room = self.num - dropped, self.blocks.num
        needed = kept + count
        if needed > room or (self.bounded and room > 3 * max(needed, 1)):
            room = needed + needed // 2
            if self.hint is not None:
                room = max(needed, min(room, self.hint // size))
        if dropped or room != self.blocks.num:
            self.blocks = self.blocks.map(lambda tensor: moved(tensor, 2, dropped, kept, room))
        if fresh is not None:
            self._fill(kept, fresh.named())
        self.first, self.num = self.first + gone * size, needed
        return (unread + count) * size

    def _fill(self, at: int, given: Mapping[str, Tensor]) -> None:
        """Write blocks from number `at` on."""
        with torch.no_grad():
            for name, kept in self.blocks.named().items():
                kept.narrow(2, at, given[name].shape[2]).copy_(given[name])

    def _move(self, start: int, held: int, size: int) -> None:
        """A tail of `size` cells that begins with the cells [start, start + held) of this one."""
        self.one, self.two = (moved(tail, 2, start, held, size) for tail in (self.one, self.two))
        self._measure()

    def _measure(self) -> None:
        self.room = self.base + self.one.shape[2]

    # Operations

    def lacks(self, cells: Cells, length: int) -> bool:
        if not length or not self.first:
            return False
        return length < self.first or cells.first_read(self.window, self.chunk, length=length) < self.first

    def crop(self, length: int) -> None:
        if not length:
            self.forget()
        elif length < self.base:
            self.num, rest = divmod(length - self.first, self.codec.cells)
            if rest:
                kept = self.codec.decode(self.blocks.slice(self.num, 1))
                self._move(0, 0, max(self.one.shape[2], rest))
                with torch.no_grad():
                    for tail, cells in zip((self.one, self.two), kept, strict=True):
                        tail.narrow(2, 0, rest).copy_(cells.narrow(2, 0, rest))
            self._measure()

    def forget(self) -> None:
        self.first = self.num = 0
        self._measure()

    def take_rows(self, index: Tensor, held: int) -> None:
        one, two = (taken(tail, index, 2, held - self.base) for tail in (self.one, self.two))
        self.blocks = self.blocks.map(lambda tensor: taken(tensor, index, 2, self.num))
        self.one, self.two = one, two

    def copy(self) -> QuantizedStore:
        twin = type(self)(
            *(resized(tail, 2, tail.shape[2], tail.shape[2]) for tail in (self.one, self.two)),
            codec=self.codec, blocks=self.blocks.map(lambda tensor: resized(tensor, 2, tensor.shape[2], self.num)),
            residual=self.residual, unpacked=self.unpacked, window=self.window, chunk=self.chunk, slack=self.slack,
            hint=self.hint,
        )  # fmt: skip
        twin.first, twin.num, twin.room = self.first, self.num, self.room
        return twin

    def tensors(self) -> list[Tensor]:
        return [self.one, self.two, *self.blocks.named().values()]

    # Files

    def saved(self, held: int) -> dict[str, Tensor]:
        """Blocks as they are and the tail. Without blocks that is what other layouts save and load."""
        tail = {
            name: t.narrow(2, 0, held - self.base) for name, t in zip(self.names, (self.one, self.two), strict=True)
        }
        return tail | self.blocks.slice(0, self.num).named() if self.num else tail

    def misfit(self, tensors: Mapping[str, Tensor], rows: int, held: int) -> str:
        blocks = {name: tensor for name, tensor in tensors.items() if name not in self.names}
        tail = {name: tensor for name, tensor in tensors.items() if name in self.names}
        shapes = self.codec.shapes(rows, 0)
        if blocks and set(blocks) != set(shapes):
            return f"it has {sorted(tensors)} and needs {sorted(self.names)}, or these and {sorted(shapes)}"
        num = blocks["k.scale"].shape[2] if blocks and blocks["k.scale"].dim() > 2 else 0
        for name, (shape, dtype) in self.codec.shapes(rows, num).items():
            if blocks and (blocks[name].shape != shape or blocks[name].dtype is not dtype):
                return (
                    f"{name} is {list(blocks[name].shape)} {blocks[name].dtype}, not {list(shape)} {dtype}: "
                    "bits and group_size must be those it was made with"
                )
        if "k" in tail and not self._suffices(num * self.codec.cells + tail["k"].shape[2], held):
            return f"its blocks and its tail are not the {held} cells it says, nor all that is needed of them"
        return super().misfit(tail, rows, held)

    def _suffices(self, cells: int, held: int) -> bool:
        """Whether the last `cells` of `held` cells are all that this store must have."""
        return min(held, self._reach) <= cells <= held if self.bounded else cells == held

    def suffices(self, cells: int, held: int) -> bool:
        """Of a file's tail: the blocks before it were counted with it."""
        return True

    def restore(self, tensors: Mapping[str, Tensor], held: int) -> None:
        self.forget()
        blocks = {name: tensor for name, tensor in tensors.items() if name not in self.names}
        if blocks:
            self.num = blocks["k.scale"].shape[2]
            if self.num > self.blocks.num:
                self.blocks = self.blocks.map(lambda tensor: resized(tensor, 2, self.num, 0))
            self._fill(0, blocks)
        cells = tensors["k"].shape[2]
        self.first = held - cells - self.num * self.codec.cells
        self._move(0, 0, max(cells, self.one.shape[2]))
        for name, tail in zip(self.names, (self.one, self.two), strict=True):
            tail.narrow(2, 0, cells).copy_(tensors[name])
        if cells > self.size:  # of a layout that packs nothing, or of one with a longer tail
            start = self._pack(held, self.first)
            self._move(start, cells - start, self.size)
