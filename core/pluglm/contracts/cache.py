"""What is kept between forward passes: slots, the layouts that hold them, and the views attention reads.

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

if TYPE_CHECKING:
    import torch
    from torch import Tensor

#: Operations a layout offers or declares absent (the names of `Cache` methods).
CacheOperation = Literal["crop", "rollback", "reorder", "repeat", "select", "fork", "reset", "save", "load"]
OPERATIONS: tuple[CacheOperation, ...] = (
    "crop", "rollback", "reorder", "repeat", "select", "fork", "reset", "save", "load",
)  # fmt: skip


@dataclass(frozen=True)
class KVSlot:
    """Keys and values of one attention layer.

    Attributes:
        num_kv_heads: K. head_dim: D of a key. v_head_dim: of a value.
        window: keys further back than this are never read again; a layout may drop them. None: all are read.
        chunk: keys of earlier chunks are never read again (Llama 4). None: all are read.
    """

    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    window: int | None = None
    chunk: int | None = None

    @property
    def kind(self) -> str:
        """The word of `pluglm.json` for what a layout must be able to make."""
        return "window" if self.window is not None else "chunk" if self.chunk is not None else "kv"


@dataclass(frozen=True)
class LatentSlot:
    """Compressed keys and values of one latent-attention layer (DeepSeek-AI 2024, "DeepSeek-V2", section 2.1.2).

    Attributes:
        latent_dim: size of the shared compressed vector of a token. rope_dim: size of its rotary key part.
    """

    latent_dim: int
    rope_dim: int
    kind: Literal["latent"] = "latent"


@dataclass(frozen=True)
class StateSlot:
    """Fixed-size state of one recurrent layer: state space, linear attention, short convolution.

    Attributes:
        states: (name, shape without batch, dtype name or None for the cache's) of each tensor, zero at the start.
    """

    states: tuple[tuple[str, tuple[int, ...], str | None], ...]
    kind: Literal["state"] = "state"


@dataclass(frozen=True)
class CrossSlot:
    """Keys and values of the encoder's output for one decoder layer: written once, then only read."""

    num_kv_heads: int
    head_dim: int
    v_head_dim: int
    kind: Literal["cross"] = "cross"


@dataclass(frozen=True)
class SharedSlot:
    """No storage of its own: reads what `source` holds (KV sharing between layers, Gemma 3n)."""

    source: int
    kind: Literal["shared"] = "shared"


Slot = KVSlot | LatentSlot | StateSlot | CrossSlot | SharedSlot


@dataclass(frozen=True)
class KeyInfo:
    """What the keys that one slot hands out in one forward pass are, in the order of the view.

    Attributes:
        positions: [B, S] or [1, S] int64 absolute positions; negative: padding or a hole.
        length: S.
        dense: known on the host, without asking the device: cell j holds position j in every row, no padding, no holes
            and, under a causal mask, the queries are the last T cells (so it can be aligned by shape alone).
        prefix_lengths: [B] int64, how many leading positions form a prefix (prefix language models). None: none.
        segments: [B, S] int64, keys of another segment than the query's are not seen (packed sequences). None: one.
        q_segments: [B, T] int64, the queries' segments; given with `segments`.
    """

    positions: Tensor
    length: int
    dense: bool
    prefix_lengths: Tensor | None = None
    segments: Tensor | None = None
    q_segments: Tensor | None = None


@runtime_checkable
class KVView(Protocol):
    """Keys and values as a layout stores them. `kind` says which class it is; a backend reads the kinds it declares.

    Storage that a view covers is finite everywhere, also in cells that are masked: 0 * NaN is NaN in every kernel.
    """

    @property
    def kind(self) -> str:
        """The class of view, as backends declare it: "dense", "paged", "quantized", "latent"."""
        ...

    def dense(self) -> tuple[Tensor, Tensor]:
        """k [B, K, S, D] and v [B, K, S, Dv] in the compute dtype, materialised if they are stored otherwise."""
        ...


@dataclass(frozen=True)
class DenseView:
    """Plain tensors. k: [B, K, S, D]; v: [B, K, S, Dv]; may be strided views of a larger buffer."""

    k: Tensor
    v: Tensor
    kind: Literal["dense"] = "dense"

    def dense(self) -> tuple[Tensor, Tensor]:
        """The tensors themselves."""
        return self.k, self.v


@dataclass(frozen=True)
class PagedView:
    """Keys and values in fixed-size pages (Kwon et al. 2023, "PagedAttention", section 4.1).

    k_pages: [P, page_size, K, D]; v_pages: [P, page_size, K, Dv]; block_table: [B, N] int32 page numbers, in order;
    lengths: [B] int32 tokens held by each row; length: cells of the longest. Cell j of row b is entry j % page_size of
    page block_table[b, j // page_size].
    """

    k_pages: Tensor
    v_pages: Tensor
    block_table: Tensor
    lengths: Tensor
    length: int
    kind: Literal["paged"] = "paged"

    def dense(self) -> tuple[Tensor, Tensor]:
        """Gather the pages of every row. Cells past a row's length hold what their page holds: mask them."""

        def gather(pages: Tensor) -> Tensor:
            rows = pages[self.block_table.long()]  # [B, N, page, K, D]
            return rows.flatten(1, 2)[:, : self.length].transpose(1, 2)  # [B, K, S, D]

        return gather(self.k_pages), gather(self.v_pages)


@dataclass(frozen=True)
class QuantizedView:
    """Packed blocks and a residual of recent tokens in full precision (Liu et al. 2024, "KIVI", section 3.2).

    blocks: the layout's own packed form. residual: the tail, dense. unpack: blocks -> dense k and v.
    """

    blocks: Any
    residual: DenseView
    unpack: Any
    kind: Literal["quantized"] = "quantized"

    def dense(self) -> tuple[Tensor, Tensor]:
        """Unpack every block and append the residual."""
        import torch

        k, v = self.unpack(self.blocks)
        return torch.cat((k, self.residual.k), dim=2), torch.cat((v, self.residual.v), dim=2)


@dataclass(frozen=True)
class LatentView:
    """Compressed tokens. latent: [B, S, latent_dim]; rope: [B, S, rope_dim]. Only latent attention reads it."""

    latent: Tensor
    rope: Tensor
    kind: Literal["latent"] = "latent"

    def dense(self) -> tuple[Tensor, Tensor]:
        """k = (latent, rope) and v = latent as one head, [B, 1, S, ·]: what absorbed queries attend to.

        Source: DeepSeek-AI 2024, "DeepSeek-V2", section 2.1.2 (the up-projections are absorbed into q and the output).
        """
        import torch

        return torch.cat((self.latent, self.rope), dim=-1)[:, None], self.latent[:, None]


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
        variant: what the user wrote after the colon ("quantized:hqq"). options: keyword options, unknown ones refused.
    """

    slots: tuple[Slot, ...]
    views: tuple[str, ...]
    device: str
    dtype: str
    operations: tuple[str, ...] = ()
    max_seq_len: int | None = None
    variant: str | None = None
    options: tuple[tuple[str, Any], ...] = ()


@runtime_checkable
class CacheLayout(Protocol):
    """Makes caches of one layout for one model. `pluglm_build_cache` is called once and returns it."""

    name: str
    operations: frozenset[str]
    #: The kind of KV view its caches hand out.
    view: str

    def new(self, *, batch_size: int, capacity: int | None = None) -> Cache:
        """An empty cache.

        Args:
            batch_size: B rows.
            capacity: cells a row will need at most, as far as the caller knows (prompt + new tokens). A layout with
                fixed storage allocates it and requires it; others may use it as a hint.
        Raises: InputError if a layout with fixed storage is not told its capacity.
        """
        ...


def slot_kinds(slots: Iterable[Slot]) -> tuple[str, ...]:
    """The distinct kinds of a model's slots, sorted: what a layout's `pluglm.json` must list."""
    return tuple(sorted({slot.kind for slot in slots} - {"shared"}))


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name without "torch." ("bfloat16")."""
    import torch

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        from pluglm.errors import InputError

        raise InputError(f"{name!r} is not a torch dtype.", fix='Write e.g. "float32" or "bfloat16".', argument="dtype")
    return dtype


def missing_operations(wanted: Sequence[str], offered: Iterable[str]) -> tuple[str, ...]:
    """Operations of `wanted` that `offered` lacks, in order."""
    have = frozenset(offered)
    return tuple(name for name in wanted if name not in have)
