"""Caches: what is kept between forward passes, the operations on it, and the layouts that make caches.

A cache is a list of slots. A layer has one slot, several (state beside keys and values, or self- and cross-attention)
or shares another layer's. A forward pass is a transaction: `begin` checks that every slot has room, `append` writes,
`commit` makes it count. A pass that fails in between leaves `length` as it was, so nothing half-written is ever read.

Rows of a batch advance together in *cells*; which of them are real is told by their positions. Padding on either side,
and tokens a strategy takes back in some rows only, are cells with position -1: present, never seen.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from pluglm.contracts.slots import Slot
from pluglm.contracts.views import KeyInfo, KVView

if TYPE_CHECKING:
    from torch import Tensor

    from pluglm.contracts.program import Rope

#: Operations a layout offers or declares absent (the names of `Cache` methods).
CacheOperation = Literal["crop", "rollback", "reorder", "repeat", "select", "fork", "reset", "save", "load"]
OPERATIONS: tuple[CacheOperation, ...] = (
    "crop", "rollback", "reorder", "repeat", "select", "fork", "reset", "save", "load",
)  # fmt: skip


@runtime_checkable
class Step(Protocol):
    """One forward pass's reservation of cells, from `Cache.begin`."""

    @property
    def count(self) -> int:
        """New cells a row, T."""
        ...

    def keys(self, slot: int) -> KeyInfo:
        """What `append(slot, …)` will hand out in this pass: the kept keys and the new ones."""
        ...


@runtime_checkable
class Cache(Protocol):
    """Everything one batch of sequences keeps. Not safe for use by two passes at once."""

    layout: str
    slots: tuple[Slot, ...]
    operations: frozenset[str]
    #: Cells a row holds, padding and holes included; the same for all rows.
    length: int
    #: Cells a row can hold; None: bounded by memory alone. A windowed layout is not bounded by its window.
    capacity: int | None
    batch_size: int
    #: Known on the host: cell j holds position j in every row, so far; no padding, no holes.
    dense: bool
    #: A text may grow beyond the model's context: distances between a query and the keys it sees stay within it
    #: (Xiao et al. 2023, "StreamingLLM", section 3.2).
    streams: bool

    @property
    def nbytes(self) -> int:
        """Bytes of storage held, spare room included."""
        ...

    def next_positions(self, count: int) -> Tensor:
        """[B, T] or [1, T] int64: the positions of `count` tokens that follow each row's last real one."""
        ...

    def begin(
        self,
        positions: Tensor,
        *,
        dense: bool = False,
        prefix_lengths: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> Step:
        """Reserve cells for the tokens of one forward pass.

        Args:
            positions: [B, T] or [1, T] int64; negative: padding.
            dense: the caller knows that they are length, length + 1, … in every row.
            prefix_lengths, segments: kept with the cells and returned in `KeyInfo`.
        Raises: ContextLengthError before anything is written, if a slot has no room.
        """
        ...

    def append(self, slot: int, k: Tensor, v: Tensor, step: Step) -> KVView:
        """Write this pass's keys and values of one slot and return all keys a query may need.

        Args:
            k: [B, K, T, D]; v: [B, K, T, Dv]. For a latent slot: rope [B, T, rope_dim] and latent [B, T, latent_dim].
        """
        ...

    def read(self, slot: int, step: Step | None = None) -> KVView:
        """All keys and values of a slot without appending: what a shared slot's layer attends to, and conversions.

        Args:
            step: a pass in progress, whose cells are included. None: the committed cells.
        """
        ...

    def cross(self, slot: int) -> tuple[KVView, KeyInfo] | None:
        """The encoder's keys of a cross slot, or None before `set_cross`."""
        ...

    def set_cross(self, slot: int, k: Tensor, v: Tensor, positions: Tensor) -> None:
        """Write a cross slot, once. Called during a pass it counts when that pass commits.

        Args:
            positions: [B, S] int64; negative: padding of the encoder's input.
        """
        ...

    def state(self, slot: int) -> dict[str, Tensor]:
        """The state tensors [B, …] of a state slot, updated in place during a pass; they count once it commits."""
        ...

    def commit(self, step: Step) -> None:
        """Make the pass count: `length` grows by `step.count`."""
        ...

    def crop(self, length: int) -> None:
        """Keep the first `length` cells. Raises CacheError if they are no longer all held (a window moved on)."""
        ...

    def rollback(self, count: int | Tensor) -> None:
        """Take back the last `count` cells; a tensor [B] gives each row a number of its own and leaves holes."""
        ...

    def reorder(self, index: Tensor) -> None:
        """Row i becomes what row index[i] was. index: [B] int64. (Beam search.)"""
        ...

    def select(self, index: Tensor) -> None:
        """Keep only these rows, in this order; any number of them. index: [B'] int64."""
        ...

    def repeat(self, count: int) -> None:
        """Every row `count` times in a row: a, b -> a, a, b, b."""
        ...

    def fork(self) -> Cache:
        """An independent copy; what either appends later the other does not see. May share storage until then."""
        ...

    def reset(self) -> None:
        """Forget all tokens, keep the storage."""
        ...

    def save(self, path: Path | str, *, fingerprint: str) -> None:
        """Write the held cells as safetensors, with the fingerprint of the model they belong to; atomic."""
        ...

    def load(self, path: Path | str, *, fingerprint: str) -> None:
        """Replace the content by a saved one. Raises CacheError if slots or fingerprint differ."""
        ...


@dataclass(frozen=True)
class CacheRequest:
    """What the planner asks a cache provider to build for one model.

    Attributes:
        slots: the model's slots, in the order its layers name them.
        views: KV views that the chosen attention backend reads, best first; give one of them.
        device, dtype: of stored tensors, as torch strings ("cpu", "float32").
        operations: operations that must work (the strategy's needs).
        max_seq_len: positions the model was made for.
        rotations: for each slot, the rotary positions that its keys carry when they are appended, so that a layout may
            move them; None: they carry none. The whole is None if the model has no program, so that nobody knows.
        learned_positions: token vectors carry learned positions, which nothing can move.
        variant: what the user wrote after the colon ("quantized:hqq"). options: keyword options, unknown ones refused.
    """

    slots: tuple[Slot, ...]
    views: tuple[str, ...]
    device: str
    dtype: str
    operations: tuple[str, ...] = ()
    max_seq_len: int | None = None
    rotations: tuple[Rope | None, ...] | None = None
    learned_positions: bool = False
    variant: str | None = None
    options: tuple[tuple[str, Any], ...] = ()


@runtime_checkable
class CacheLayout(Protocol):
    """Makes caches of one layout for one model. `pluglm_build_cache` is called once and returns it."""

    name: str
    operations: frozenset[str]
    #: The kind of KV view its caches hand out.
    view: str
    #: As in its caches.
    streams: bool

    def new(self, *, batch_size: int, capacity: int | None = None) -> Cache:
        """An empty cache.

        Args:
            batch_size: B rows.
            capacity: cells a row will need at most, as far as the caller knows (prompt + new tokens). A layout with
                fixed storage allocates it and requires it; others may use it as a hint.
        Raises: InputError if a layout with fixed storage is not told its capacity.
        """
        ...


def missing_operations(wanted: Sequence[str], offered: Iterable[str]) -> tuple[str, ...]:
    """Operations of `wanted` that `offered` lacks, in order."""
    have = frozenset(offered)
    return tuple(name for name in wanted if name not in have)
