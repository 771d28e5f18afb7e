"""Attention sinks: the first tokens of every row and the last ones are kept, and the first stand right before the last.

A trained model gives the first tokens of a text much of its attention, whatever they say. Without them it breaks down;
with them and a window it goes on for ever. Positions are those within the cache: rotary ones are relative, so instead
of giving every kept key a new position for every token, the few sinks are turned onwards to where the window begins.

Source: Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", section 3.2.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pluglm_blocks.ops import rope
from torch import Tensor

from pluglm.contracts import KeyInfo, KVSlot
from pluglm_caches.cells import Cells
from pluglm_caches.stores import Pass, resized, taken, zeros
from pluglm_caches.windows import WindowStore

_CELLS = 2  # the axis of the cells of keys and values
_LAST = torch.iinfo(torch.int64).max


@dataclass(frozen=True)
class Moved:
    """What a pass sees once tokens have been evicted.

    Attributes:
        begin: the first cell of the view; the sinks come after its last one. keys: with the sinks' moved positions.
        turns: cos and sin [B or 1, 1, dim/2] float32 of the angles by which sinks go on, for each distinct rotation.
    """

    begin: int
    keys: KeyInfo
    turns: list[tuple[Tensor, Tensor]]


class Sinks:
    """The books of the sinks of one cache: where each row's are, and where the pass under way sees them.

    A row's sinks are its first `num` real tokens: padding is none, and later padding or holes do no harm.

    Args:
        num: sinks of a row. window: tokens that a query sees beside them, itself included.
        speeds: radians a position, float32 [dim/2], of each distinct rotation.

    Attributes:
        extent: the cells before it hold all sinks that are known; 0: none are.
        complete: every row has `num` of them.
        positions, cells: [B or 1, num] int64; -1: the row has no such token yet. None: nothing was evicted so far.
    """

    def __init__(self, num: int, window: int, speeds: tuple[Tensor, ...]) -> None:
        self.num, self.window, self.speeds = num, window, speeds
        self.forget()

    def forget(self) -> None:
        """No sink is known: nothing was evicted."""
        self.positions: Tensor | None = None
        self.cells: Tensor | None = None
        self.extent, self.complete = 0, False
        self._pass: Pass | None = None
        self._moves: dict[int, Moved | None] = {}

    def start(self, length: int, count: int) -> int:
        """The first cell that is not evicted when a pass of `count` tokens begins after `length` cells."""
        return min(length, length + count - self.window)

    def find(self, cells: Cells, first: int, length: int) -> Tensor | None:
        """Look for the first real tokens of every row. Asks the device, unless the text begins with dense cells.

        Args:
            first: the first cell that is still held. length: the cells before it count.
        Returns: which of the known sinks (if there are any) and the held cells, in this order, are the sinks: [B, num];
            None: the first cells.
        """
        if self.positions is None and cells.dense_length >= self.num:
            self._note(resized(cells.ramp(0, self.num), 1, self.num, self.num))
            return None
        assert cells.positions is not None
        positions = cells.positions.narrow(1, first - cells.first, length - first)
        where = torch.arange(first, length, device=positions.device).expand_as(positions)
        if self.positions is not None and self.cells is not None:
            known = self.positions.expand(positions.shape[0], -1)
            positions = positions.masked_fill(positions <= known.amax(1, keepdim=True), -1)
            positions = torch.cat((known, positions), dim=1)
            where = torch.cat((self.cells.expand_as(known), where), dim=1)
        index = (positions < 0).byte().argsort(dim=1, stable=True)[:, : self.num]  # real ones first, in their order
        found = positions.gather(1, index)
        self._note(found, where.gather(1, index).masked_fill(found < 0, -1))
        return index

    def _note(self, positions: Tensor, cells: Tensor | None = None) -> None:
        rows = positions.shape[0]
        self.positions = resized(positions, 0, rows, rows)
        if cells is None:
            self.cells, self.extent, self.complete = self.positions, self.num, True
        else:
            self.cells = resized(cells, 0, rows, rows)
            self.extent, self.complete = int(cells.amax()) + 1, bool((positions >= 0).all())

    def moved(self, current: Pass, first: int) -> Moved | None:
        """What the pass sees of a slot that holds the cells from `first` on; None: all of them, nothing is evicted."""
        if current is not self._pass:
            self._pass, self._moves = current, {}
        if first not in self._moves:
            start = self.start(current.start, current.count)
            plain = start <= self.num and not first
            self._moves[first] = None if plain else self._move(current, first, start)
        return self._moves[first]

    def _move(self, current: Pass, first: int, start: int) -> Moved:
        cells, end = current.cells, current.end
        if current.dense:
            first = max(start, self.num)
            window, sinks = cells.ramp(first, end), cells.ramp(first - self.num, first)
            distance = sinks[:, :1]  # from 0
        else:
            assert cells.positions is not None
            assert self.positions is not None
            window = cells.positions.narrow(1, first - cells.first, end - first)
            new = window.narrow(1, end - first - current.count, current.count)
            own = new.masked_fill(new < 0, _LAST).amin(1, keepdim=True)  # the first token of this pass, [B, 1]
            begin = torch.minimum(own, window.amax(1, keepdim=True) + 1 - self.window)
            after = self.positions.amax(1, keepdim=True) + 1  # where the sinks end, [B or 1, 1]
            begin = torch.maximum(begin, after)
            distance = begin - after
            window = window.masked_fill(window < begin, -1)
            sinks = torch.where(self.positions >= 0, self.positions + distance, -1)
        positions = torch.cat((window, sinks), dim=1)
        keys = KeyInfo(positions, positions.shape[1], False, current.prefix)
        angles = [distance[..., None].float() * speeds for speeds in self.speeds]  # [B or 1, 1, dim/2]
        return Moved(first, keys, [(angle.cos(), angle.sin()) for angle in angles])

    def take_rows(self, index: Tensor) -> None:
        """Row i becomes what row index[i] was."""
        self.positions, self.cells = (
            taken(tensor, index) if tensor is not None and tensor.shape[0] > 1 else tensor
            for tensor in (self.positions, self.cells)
        )

    def copy(self) -> Sinks:
        """An independent copy."""
        twin = Sinks(self.num, self.window, self.speeds)
        if self.positions is not None and self.cells is not None:
            twin.restore(self.positions, self.cells)
        return twin

    def restore(self, positions: Tensor, cells: Tensor) -> None:
        """Replace what is known."""
        self.forget()
        self._note(positions, cells)

    def tensors(self) -> list[Tensor]:
        """Everything that occupies memory."""
        return [tensor for tensor in (self.positions, self.cells) if tensor is not None]


class SinkStore(WindowStore):
    """A window, and beside it the sinks as they were appended.

    In a pass that sees evicted text, the sinks are written behind the new cells, their keys turned onwards: cells there
    count for nothing, so a pass that fails, and one that is taken back, have lost nothing; and no key of the window is
    touched. They are turned from the original each time, so that rounding errors do not add up.

    Args:
        sinks: the cache's books. turn: which of their rotations the keys carry; None: none. interleaved: of it.
        slack: tokens that every row can take back: what is seen after that is kept, too.
    """

    kind = "sink"

    def __init__(
        self, first: Tensor, second: Tensor, *, sinks: Sinks, turn: int | None, interleaved: bool, slack: int,
        hint: int | None = None,
    ) -> None:  # fmt: skip
        self.sinks, self.turn, self.interleaved, self.spare = sinks, turn, interleaved, sinks.num
        self.kept: tuple[Tensor, Tensor] | None = None  # the sinks; None: nothing was evicted so far
        super().__init__(first, second, window=sinks.window, chunk=None, slack=slack, hint=hint)

    @classmethod
    def over(
        cls, sinks: Sinks, slot: KVSlot, rows: int, dtype: torch.dtype, device: torch.device, **how: Any
    ) -> SinkStore:
        """Storage for one layer. how: as in the class."""
        k = zeros((rows, slot.num_kv_heads, 0, slot.head_dim), dtype, device)
        return cls(k, zeros((rows, slot.num_kv_heads, 0, slot.v_head_dim), dtype, device), sinks=sinks, **how)

    # A pass

    def keys(self, current: Pass) -> KeyInfo | None:
        moved = self.sinks.moved(current, self.first)
        return None if moved is None else moved.keys

    def seen_from(self, current: Pass) -> int:
        """All that is held; asked only while that is the whole text."""
        return self.first

    def seen(self, current: Pass) -> Any:
        end, moved = current.end, self.sinks.moved(current, self.first)
        return self.read(self.first, end) if moved is None else self.read(moved.begin, end + self.spare)

    def write(self, k: Tensor, v: Tensor, current: Pass) -> Any:
        """Write the pass and, behind it, the sinks."""
        self.put(k, v, current.start - self.first, current.count)
        moved, end = self.sinks.moved(current, self.first), current.end
        if moved is None:
            return self.read(self.first, end)
        assert self.kept is not None  # the cache has looked for them before the pass
        key, value = self.kept
        if self.turn is not None:
            key = rope(key, *moved.turns[self.turn], self.interleaved)
        self.one.narrow(_CELLS, end - self.first, self.spare).copy_(key)
        self.two.narrow(_CELLS, end - self.first, self.spare).copy_(value)
        return self.read(moved.begin, end + self.spare)

    def _kept(self, cells: Cells) -> tuple[int, int]:
        """Nothing is dropped before the sinks are set aside, and none of them while it is in reach of the window."""
        start, held = super()._kept(cells)
        if self.kept is None or start < self.sinks.extent:
            return self.first, cells.length - self.first
        return start, held

    def set_aside(self, index: Tensor | None, length: int) -> None:
        """Copy the sinks. index: as `Sinks.find` returned it. length: cells that count."""
        kept = []
        for i, tensor in enumerate((self.one, self.two)):
            held = tensor.narrow(_CELLS, 0, length - self.first)
            if index is not None:
                held = held if self.kept is None else torch.cat((self.kept[i], held), dim=_CELLS)
                held = held.gather(_CELLS, index[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3]))
            kept.append(resized(held, _CELLS, self.spare, self.spare))
        self.kept = kept[0], kept[1]

    # Operations

    def lacks(self, cells: Cells, length: int) -> bool:
        return super().lacks(cells, length) or (self.first > 0 and 0 < length < self.sinks.extent)

    def committed(self, length: int) -> Any:
        """Once cells were dropped: the sinks as they were appended, then what is held."""
        held = self.read(self.first, length)
        if self.kept is None or not self.first:
            return held
        pairs = zip(self.kept, held.dense(), strict=True)
        return self.view(*(torch.cat(pair, dim=_CELLS) for pair in pairs))

    def forget(self) -> None:
        super().forget()
        self.kept = None

    def take_rows(self, index: Tensor, held: int) -> None:
        super().take_rows(index, held)
        if self.kept is not None:
            self.kept = taken(self.kept[0], index), taken(self.kept[1], index)

    def like(self, one: Tensor, two: Tensor) -> SinkStore:
        twin = type(self)(
            one, two, sinks=self.sinks, turn=self.turn, interleaved=self.interleaved, slack=self.slack, hint=self.hint
        )
        if self.kept is not None:
            k, v = (resized(tensor, _CELLS, self.spare, self.spare) for tensor in self.kept)
            twin.kept = k, v
        return twin

    def tensors(self) -> list[Tensor]:
        return [self.one, self.two, *(self.kept or ())]

    # Files

    def saved(self, held: int) -> dict[str, Tensor]:
        """The sinks too, if cells were dropped. Otherwise what other layouts save and load."""
        tensors = super().saved(held)
        if self.first and self.kept is not None and self.sinks.positions is not None and self.sinks.cells is not None:
            places = (self.sinks.positions, self.sinks.cells)
            positions, cells = (place.expand(self.one.shape[0], -1).clone() for place in places)  # a file shares none
            k, v = self.kept
            tensors |= {"sinks.k": k, "sinks.v": v, "sinks.positions": positions, "sinks.cells": cells}
        return tensors

    def misfit(self, tensors: Mapping[str, Tensor], rows: int, held: int) -> str:
        sinks, window = _apart(tensors)
        if reason := super().misfit(window, rows, held):
            return reason
        if not sinks:
            return "" if window["k"].shape[_CELLS] == held else "it has dropped cells and kept no sinks"
        shapes = {"sinks.positions": [rows, self.spare], "sinks.cells": [rows, self.spare]}
        for name, kept in (("sinks.k", self.one), ("sinks.v", self.two)):
            shapes[name] = [rows, kept.shape[1], self.spare, kept.shape[3]]
        for name in sorted(set(shapes) | set(sinks)):
            dtype = self.dtype if name in ("sinks.k", "sinks.v") else torch.int64
            if name not in sinks or list(sinks[name].shape) != shapes.get(name) or sinks[name].dtype is not dtype:
                given = f"{list(sinks[name].shape)} {sinks[name].dtype}" if name in sinks else "absent"
                return f"{name} is {given}, not {shapes.get(name)} {dtype}: the number of sinks must be the same"
        return ""

    def restore(self, tensors: Mapping[str, Tensor], held: int) -> None:
        sinks, window = _apart(tensors)
        super().restore(window, held)
        if sinks:
            device = self.one.device
            k, v, positions, cells = (sinks[f"sinks.{n}"].to(device) for n in ("k", "v", "positions", "cells"))
            self.kept = (resized(k, _CELLS, self.spare, self.spare), resized(v, _CELLS, self.spare, self.spare))
            self.sinks.restore(positions, cells)


def _apart(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file's sinks and its window."""
    sinks = {name: tensor for name, tensor in tensors.items() if name.startswith("sinks.")}
    return sinks, {name: tensor for name, tensor in tensors.items() if name not in sinks}
