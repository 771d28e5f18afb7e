"""Positions as the kernels of FlashAttention want them: pieces without padding, and their lengths added up.

Attention does not depend on the order of its keys. Sorted by segment and position, with padding and holes left out,
the keys that a query sees lie side by side: from its window's or chunk's start to itself, or to the segment's end. A
kernel takes pieces: some queries and the keys of the last of them, where every earlier query sees one key less. So a
row without holes is one piece, a chunk or a packed segment is one, and a query that fits nowhere is one by itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from pluglm.contracts import KeyInfo, MaskSpec

#: Room for the positions of one segment, when segment and position are sorted as one number.
SPAN = 1 << 31
FAR = torch.iinfo(torch.int64).max


@dataclass(frozen=True, slots=True)
class Pieces:
    """What is packed, and where it comes from.

    Attributes:
        rows: of the positions; 1 may stand for every row of a batch.
        q_rows, q_cells: [N] int64, where each packed query lies. k_rows, k_cells: [M] int64, where each key lies.
        q_starts, k_starts: [P + 1] int32, the pieces' lengths added up ("cu_seqlens").
        lengths: queries and keys of each piece, known on the host.
        gaps: whether some piece's keys skip a position, so that cells cannot stand for positions.
        repeats: whether a window holds more keys than it has positions.
    """

    rows: int
    q_rows: Tensor
    q_cells: Tensor
    k_rows: Tensor
    k_cells: Tensor
    q_starts: Tensor
    k_starts: Tensor
    lengths: tuple[tuple[int, int], ...]
    gaps: bool
    repeats: bool

    def for_batch(self, batch_size: int) -> Pieces:
        """The same pieces in every row of a batch, if one row stands for all."""
        if self.rows == batch_size:
            return self

        def spread(cells: Tensor) -> tuple[Tensor, Tensor]:
            every = torch.arange(batch_size, device=cells.device)
            return every.repeat_interleave(len(cells)), cells.repeat(batch_size)

        def again(starts: Tensor) -> Tensor:
            return _add_up(starts.diff().repeat(batch_size))

        return Pieces(
            batch_size, *spread(self.q_cells), *spread(self.k_cells), again(self.q_starts), again(self.k_starts),
            self.lengths * batch_size, self.gaps, self.repeats,
        )  # fmt: skip


def cut(mask: MaskSpec, q_positions: Tensor, keys: KeyInfo) -> Pieces:
    """Cut a pass into pieces. Asks the device for their number and lengths, once a pass.

    Args:
        mask: without prefix; a window or chunk becomes the pieces' first keys.
        q_positions, keys: as in `AttentionBackend.prepare`.
    """
    rows = max(q_positions.shape[0], keys.positions.shape[0], 1 if keys.segments is None else keys.segments.shape[0])
    q, k = q_positions.expand(rows, -1), keys.positions.expand(rows, -1)
    origin, k_origin = torch.zeros_like(q), torch.zeros_like(k)
    if keys.segments is not None and keys.q_segments is not None:
        origin, k_origin = keys.q_segments.expand(rows, -1) * SPAN, keys.segments.expand(rows, -1) * SPAN
    ordered, order = torch.sort(torch.where(k >= 0, k_origin + k, FAR), dim=1)

    def before(position: Tensor) -> Tensor:
        """How many keys of the row come before a position of the query's segment, [rows, T]."""
        return torch.searchsorted(ordered, (origin + position).contiguous())

    first, last = before(torch.zeros_like(q)), before(q + 1 if mask.causal else torch.full_like(q, SPAN))
    if mask.window is not None:
        first = first.maximum(before((q - mask.window + 1).clamp(min=0)))
    if mask.chunk is not None:
        start = q // mask.chunk * mask.chunk
        first, last = first.maximum(before(start)), last.minimum(before(start + mask.chunk))
    q_rows, q_cells = ((q >= 0) & (first < last)).nonzero(as_tuple=True)
    first, last = first[q_rows, q_cells], last[q_rows, q_cells]

    begins = torch.ones_like(first, dtype=torch.bool)
    begins[1:] = (q_rows[1:] != q_rows[:-1]) | ~_continues(mask, first, last)
    heads = begins.nonzero()[:, 0]
    tails = torch.cat((heads[1:], heads.new_tensor([len(first)]))) - 1 if len(first) else heads
    q_lengths, k_lengths = tails - heads + 1, last[tails] - first[heads]
    q_starts, k_starts = _add_up(q_lengths), _add_up(k_lengths)
    k_rows = q_rows[heads].repeat_interleave(k_lengths)
    places = torch.arange(len(k_rows), device=q.device) + (first[heads] - k_starts[:-1]).repeat_interleave(k_lengths)
    gaps = ordered[q_rows[heads], last[tails] - 1] - ordered[q_rows[heads], first[heads]] != k_lengths - 1
    repeats = last - first > mask.window if mask.window is not None else begins[:0]
    lengths = torch.stack((q_lengths, k_lengths), dim=1).tolist()
    return Pieces(
        rows, q_rows, q_cells, k_rows, order[k_rows, places], q_starts, k_starts,
        tuple((int(a), int(b)) for a, b in lengths), bool(gaps.any()), bool(repeats.any()),
    )  # fmt: skip


def _continues(mask: MaskSpec, first: Tensor, last: Tensor) -> Tensor:
    """Whether each query but the first belongs to the piece of the one before it, [N - 1] bool."""
    same = first[1:] == first[:-1]
    if not mask.causal:  # an open piece shows all its keys to all its queries
        return same & (last[1:] == last[:-1])
    if mask.window is not None:  # the first key moves on exactly when the window is full
        count = last[1:] - first[1:]
        same = (same & (count <= mask.window)) | ((first[1:] == first[:-1] + 1) & (count == mask.window))
    return same & (last[1:] == last[:-1] + 1)


def _add_up(lengths: Tensor) -> Tensor:
    """[P] -> [P + 1] int32, from 0."""
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
