"""Slots: what one layer needs kept between forward passes. A layer has one, several, or shares another layer's."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


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


def slot_kinds(slots: Iterable[Slot]) -> tuple[str, ...]:
    """The distinct kinds of a model's slots, sorted: what a layout's `pluglm.json` must list."""
    return tuple(sorted({slot.kind for slot in slots} - {"shared"}))
