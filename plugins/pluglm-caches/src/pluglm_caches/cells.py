"""Which cells of a cache are real and at which positions, known on the host as long as they are simply 0, 1, 2, …

As long as every pass says `dense`, no tensor of positions is written: a view of one ramp 0, 1, 2, … serves all. The
first pass with padding, gaps or repeated positions fills in the cells so far; from then on every pass writes its own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pluglm.contracts import KeyInfo
from pluglm_caches.stores import resized, taken, zeros


class Cells:
    """The books of one cache, shared by all its slots.

    Attributes:
        length: committed cells a row.
        dense_length: how many leading cells are known to hold their own index as position in every row.
        positions: [B, room] int64, valid for all committed cells while `dense_length < length`. None: never needed.
        segmented: the committed passes gave segments. segments: [B, room] int64, valid while `segmented`.
        prefix: [B] int64 prefix lengths, or None.
    """

    def __init__(self, rows: int, room: int, device: torch.device) -> None:
        self.rows, self.room, self.device = rows, room, device
        self.length = 0
        self.dense_length = 0
        self.positions: Tensor | None = None
        self.segmented = False
        self.segments: Tensor | None = None
        self.prefix: Tensor | None = None
        self._ramp = zeros((1, 0), torch.int64, device)

    def ramp(self, start: int, end: int) -> Tensor:
        """[1, end - start]: start, start + 1, …"""
        if end > self._ramp.shape[1]:
            with torch.inference_mode(False):
                self._ramp = torch.arange(max(end + end // 2, self.room), device=self.device)[None]
        return self._ramp.narrow(1, start, end - start)

    def reserve(self, room: int) -> None:
        """Make room for `room` cells in all."""
        if self.positions is not None:
            self.positions = resized(self.positions, 1, room, self.length)
        if self.segments is not None:
            self.segments = resized(self.segments, 1, room, self.length)
        self.room = room

    def next(self, count: int) -> Tensor:
        """[1, T] or [B, T]: what follows each row's highest position."""
        if self.dense_length == self.length:
            return self.ramp(self.length, self.length + count)
        assert self.positions is not None
        highest = self.positions.narrow(1, 0, self.length).amax(1, keepdim=True).clamp_(min=-1)
        return highest + 1 + self.ramp(0, count)

    def write(self, positions: Tensor, count: int, *, dense: bool) -> bool:
        """Note the positions of a pass in the cells after `length`. Returns whether the cells are dense with them."""
        plain = self.dense_length == self.length
        if dense and plain:
            return True
        if plain:
            self._spell_out()
        assert self.positions is not None
        self.positions.narrow(1, self.length, count).copy_(positions)
        return False

    def write_segments(self, segments: Tensor, count: int) -> None:
        """Note the segments of a pass; cells from before the first such pass are in segment 0."""
        if self.segments is None:
            self.segments = zeros((self.rows, self.room), torch.int64, self.device)
        if not self.segmented:
            self.segments.narrow(1, 0, self.length).zero_()
        self.segments.narrow(1, self.length, count).copy_(segments)

    def _spell_out(self) -> None:
        """Write the positions of the cells that were dense so far."""
        if self.positions is None:
            self.positions = zeros((self.rows, self.room), torch.int64, self.device)
        self.positions.narrow(1, 0, self.length).copy_(self.ramp(0, self.length))

    def info(self, end: int, count: int, *, dense: bool, prefix: Tensor | None, segmented: bool) -> KeyInfo:
        """What the keys [0, end) are when the last `count` of them are this pass's."""
        if dense:
            positions = self.ramp(0, end)
        else:
            assert self.positions is not None
            positions = self.positions.narrow(1, 0, end)
        if not segmented:
            return KeyInfo(positions, end, dense, prefix)
        assert self.segments is not None
        segments = self.segments.narrow(1, 0, end)
        return KeyInfo(positions, end, dense, prefix, segments, segments.narrow(1, end - count, count))

    def commit(self, end: int, *, dense: bool, prefix: Tensor | None, segmented: bool) -> None:
        """The pass counts."""
        if dense:
            self.dense_length = end
        self.length, self.prefix, self.segmented = end, prefix, segmented

    def crop(self, length: int) -> None:
        """Keep the first `length` cells."""
        self.length, self.dense_length = length, min(self.dense_length, length)
        if not length:
            self.prefix, self.segmented = None, False

    def punch(self, counts: Tensor, highest: int) -> None:
        """Turn the last counts[b] cells of row b into holes; `highest` is the largest count."""
        if self.dense_length == self.length:
            self._spell_out()
        assert self.positions is not None
        start = self.length - highest
        gone = self.ramp(start, self.length) >= (self.length - counts.to(self.device))[:, None]  # [B, highest]
        self.positions.narrow(1, start, highest).masked_fill_(gone, -1)
        self.dense_length = min(self.dense_length, start)

    def take_rows(self, index: Tensor) -> None:
        """Row i becomes what row index[i] was."""
        positions, segments = (
            None if tensor is None else taken(tensor, index, 1, self.length)
            for tensor in (self.positions, self.segments)
        )
        self.prefix = None if self.prefix is None else taken(self.prefix, index)
        self.positions, self.segments, self.rows = positions, segments, index.shape[0]

    def copy(self) -> Cells:
        """An independent copy."""
        twin = Cells(self.rows, self.room, self.device)
        twin.length, twin.dense_length, twin.segmented = self.length, self.dense_length, self.segmented
        twin.positions, twin.segments = (
            None if tensor is None else resized(tensor, 1, self.room, self.length)
            for tensor in (self.positions, self.segments)
        )
        twin.prefix = None if self.prefix is None else resized(self.prefix, 0, self.rows, self.rows)
        return twin

    def tensors(self) -> list[Tensor]:
        """Everything that occupies memory."""
        return [t for t in (self._ramp, self.positions, self.segments, self.prefix) if t is not None]
