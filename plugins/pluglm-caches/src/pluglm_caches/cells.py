"""Which cells of a cache are real and at which positions, known on the host as long as they are simply 0, 1, 2, …

As long as every pass says `dense`, no tensor of positions is written: a view of one ramp 0, 1, 2, … serves all. The
first pass with padding, gaps or repeated positions fills in the cells so far; from then on every pass writes its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pluglm.contracts import KeyInfo
from pluglm_caches.stores import moved, resized, taken, zeros

_FIRST_ROOM = 64


class Cells:
    """The books of one cache, shared by all its slots.

    Attributes:
        length: committed cells a row, since the start of the text.
        first: the cells before it are forgotten: no slot holds them any more. room: the cell up to which there is room.
        dense_length: how many leading cells are known to hold their own index as position in every row.
        positions: [B, width] int64 of the cells from `first` on, valid for all committed ones while
            `dense_length < length`. None: never needed.
        segmented: the committed passes gave segments. segments: [B, width] int64, valid while `segmented`.
        prefix: [B] int64 prefix lengths, or None.
    """

    def __init__(self, rows: int, room: int, device: torch.device) -> None:
        self.rows, self.room, self.device = rows, room, device
        self.first = 0
        self.length = 0
        self.dense_length = 0
        self.positions: Tensor | None = None
        self.segmented = False
        self.segments: Tensor | None = None
        self.prefix: Tensor | None = None
        self._ramp = zeros((1, 0), torch.int64, device)
        self._ramp_start = 0

    @property
    def dense(self) -> bool:
        """Known on the host: every committed cell holds its own index as position, in every row."""
        return self.dense_length == self.length

    def ramp(self, start: int, end: int) -> Tensor:
        """[1, end - start]: start, start + 1, …"""
        if start < self._ramp_start or end > self._ramp_start + self._ramp.shape[1]:
            base = min(start, self.first)
            needed = max(end, self.room) - base
            width = -(-(needed + needed // 2) // _FIRST_ROOM) * _FIRST_ROOM  # rounded up: of one size from some time on
            with torch.inference_mode(False):
                self._ramp = torch.arange(base, base + width, device=self.device)[None]
            self._ramp_start = base
        # By known strides, as stores slice: two such slices are made for every token.
        return self._ramp.as_strided((1, end - start), (1, 1), start - self._ramp_start)

    def begin(self, first: int, count: int, room: int | None) -> None:
        """Have room for `count` cells more, up to the cell `room` if it is given; forget those before `first`."""
        width, held = self.room - self.first, self.length - first
        if room is not None:
            width = room - first
        elif held + count > width:
            width = max(_FIRST_ROOM, held + count + (held + count) // 2)
        self.positions, self.segments = (
            None if tensor is None else moved(tensor, 1, first - self.first, held, width)
            for tensor in (self.positions, self.segments)
        )
        self.first, self.room = first, first + width

    def next(self, count: int) -> Tensor:
        """[1, T] or [B, T]: what follows each row's highest position."""
        if self.dense:
            return self.ramp(self.length, self.length + count)
        assert self.positions is not None
        highest = self.positions.narrow(1, 0, self.length - self.first).amax(1, keepdim=True).clamp_(min=-1)
        with torch.inference_mode(False):
            return highest + 1 + torch.arange(count, device=self.device)[None]

    def first_read(self, window: int | None, chunk: int | None, *, length: int | None = None, back: int = 0) -> int:
        """The first cell that a query after the first `length` cells (None: all) can see through a window or chunk.

        Positions of a row do not go back, so what no row's next query sees is never seen again. With segments they do,
        and nothing may be dropped. Asks the device, unless the cells are dense.

        Args:
            back: each row may go back by as many tokens first.
        """
        length = self.length if length is None else length
        if self.segmented:
            return self.first
        if self.dense_length >= length:
            position = max(0, length - back)
            by_window = 0 if window is None else max(0, position - window + 1)
            return max(by_window, 0 if chunk is None else position // chunk * chunk)
        assert self.positions is not None
        positions = self.positions.narrow(1, 0, length - self.first)
        following = positions.amax(1, keepdim=True) + 1 - back  # [B, 1]
        seen = positions >= 0
        if window is not None:
            seen &= following - positions < window
        if chunk is not None:
            seen &= positions // chunk >= following // chunk
        columns = seen.any(0).nonzero()
        return self.first + int(columns[0]) if columns.shape[0] else length

    def write(self, positions: Tensor, count: int, *, dense: bool) -> bool:
        """Note the positions of a pass in the cells after `length`. Returns whether the cells are dense with them."""
        if dense and self.dense:
            return True
        if self.dense:
            self._spell_out()
        assert self.positions is not None
        self.positions.narrow(1, self.length - self.first, count).copy_(positions)
        return False

    def write_segments(self, segments: Tensor, count: int) -> None:
        """Note the segments of a pass; cells from before the first such pass are in segment 0."""
        held = self.length - self.first
        if self.segments is None:
            self.segments = zeros((self.rows, self.room - self.first), torch.int64, self.device)
        if not self.segmented:
            self.segments.narrow(1, 0, held).zero_()
        self.segments.narrow(1, held, count).copy_(segments)

    def _spell_out(self) -> None:
        """Write the positions of the cells that were dense so far."""
        if self.positions is None:
            self.positions = zeros((self.rows, self.room - self.first), torch.int64, self.device)
        self.positions.narrow(1, 0, self.length - self.first).copy_(self.ramp(self.first, self.length))

    def info(self, start: int, end: int, count: int, *, dense: bool, prefix: Tensor | None, segmented: bool) -> KeyInfo:
        """What the keys [start, end) are when the last `count` of them are this pass's."""
        if dense:
            positions = self.ramp(start, end)
        else:
            assert self.positions is not None
            positions = self.positions.narrow(1, start - self.first, end - start)
        plain, since, length = dense and start == 0, start if dense else None, end - start
        if not segmented:
            return KeyInfo(positions, length, plain, prefix, start=since)
        assert self.segments is not None
        segments = self.segments.narrow(1, start - self.first, length)
        own = segments.narrow(1, length - count, count)
        return KeyInfo(positions, length, plain, prefix, segments, own, start=since)

    def commit(self, end: int, *, dense: bool, prefix: Tensor | None, segmented: bool) -> None:
        """The pass counts."""
        if dense:
            self.dense_length = end
        self.length, self.prefix, self.segmented = end, prefix, segmented

    def crop(self, length: int) -> None:
        """Keep the first `length` cells."""
        self.length, self.dense_length = length, min(self.dense_length, length)
        if not length:
            self.room -= self.first
            self.first, self.prefix, self.segmented = 0, None, False

    def punch(self, counts: Tensor, highest: int) -> None:
        """Turn the last counts[b] cells of row b into holes; `highest` is the largest count."""
        if self.dense:
            self._spell_out()
        assert self.positions is not None
        start = self.length - highest
        gone = self.ramp(start, self.length) >= (self.length - counts.to(self.device))[:, None]  # [B, highest]
        self.positions.narrow(1, start - self.first, highest).masked_fill_(gone, -1)
        self.dense_length = min(self.dense_length, start)

    def take_rows(self, index: Tensor) -> None:
        """Row i becomes what row index[i] was."""
        positions, segments = (
            None if tensor is None else taken(tensor, index, 1, self.length - self.first)
            for tensor in (self.positions, self.segments)
        )
        self.prefix = None if self.prefix is None else taken(self.prefix, index)
        self.positions, self.segments, self.rows = positions, segments, index.shape[0]

    def copy(self) -> Cells:
        """An independent copy."""
        twin = Cells(self.rows, self.room, self.device)
        twin.first, twin.length, twin.dense_length = self.first, self.length, self.dense_length
        twin.segmented = self.segmented
        twin.positions, twin.segments = (
            None if tensor is None else resized(tensor, 1, self.room - self.first, self.length - self.first)
            for tensor in (self.positions, self.segments)
        )
        twin.prefix = None if self.prefix is None else resized(self.prefix, 0, self.rows, self.rows)
        return twin

    def tensors(self) -> list[Tensor]:
        """Everything that occupies memory."""
        return [t for t in (self._ramp, self.positions, self.segments, self.prefix) if t is not None]
