"""What the layers of one forward pass share, each computed once: masks, rotations, buckets, the cache's step.

`PassPlan` is filled while the layers are built: each asks for what it needs and remembers an index, equal requests get
the same one. `PassPlan.begin` computes them for one pass; layers read by index, nothing is looked up by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from pluglm.contracts import AttentionBackend, AttentionSpec, Cache, ForwardInput, KVView, Rope, SharedSlot, Slot, Step
from pluglm_blocks.relative import relative_buckets
from pluglm_blocks.rope import RotaryTable
from pluglm_blocks.uncached import Uncached

Item = TypeVar("Item")


@dataclass(slots=True)
class PassState:
    """One pass.

    Attributes:
        cache, step: where new keys go. masks: one for each distinct (spec, slot geometry), as the backend made them.
        rotations: (cos, sin) [B or 1, T, dim/2] float32 for each distinct rope.
        buckets: [B or 1, T, S] int64. temperatures: [B or 1, 1, T, 1] float32, factors on queries.
        views: by slot, the keys and values that a later layer shares; None where none does.
    """

    cache: Cache | Uncached
    step: Step
    masks: list[Any]
    rotations: list[tuple[Tensor, Tensor]]
    buckets: list[Tensor]
    temperatures: list[Tensor]
    views: list[KVView | None]


class PassPlan:
    """What to compute once a pass."""

    def __init__(self, slots: Sequence[Slot], backend: AttentionBackend | None) -> None:
        self._slots, self._backend = tuple(slots), backend
        self._groups: list[int] = []  # the first slot of each geometry: equal slots hand out equal keys
        self._masks: list[tuple[AttentionSpec, int]] = []
        self._buckets: list[tuple[int, int, bool, int]] = []
        self._ropes: list[Rope] = []
        self._tables: list[RotaryTable] = []
        self._temperatures: list[tuple[float, float]] = []
        self._uncached = Uncached()

    def source(self, slot: int) -> int:
        """The slot that holds what `slot` hands out: itself, unless it is shared."""
        found = self._slots[slot]
        return found.source if isinstance(found, SharedSlot) else slot

    def is_shared(self, slot: int) -> bool:
        """Whether another slot reads this one."""
        return any(isinstance(other, SharedSlot) and other.source == slot for other in self._slots)

    def mask(self, spec: AttentionSpec, slot: int) -> int:
        """Index in `PassState.masks`."""
        return _index(self._masks, (spec, self._group(slot)))

    def rotation(self, rope: Rope) -> int:
        """Index in `PassState.rotations`."""
        index = _index(self._ropes, rope)
        if index == len(self._tables):
            self._tables.append(RotaryTable(rope))
        return index

    def relative(self, num_buckets: int, max_distance: int, bidirectional: bool, slot: int) -> int:
        """Index in `PassState.buckets`."""
        return _index(self._buckets, (num_buckets, max_distance, bidirectional, self._group(slot)))

    def temperature(self, scale: float, floor: float) -> int:
        """Index in `PassState.temperatures`."""
        return _index(self._temperatures, (scale, floor))

    def _group(self, slot: int) -> int:
        slot = self.source(slot)
        for group, first in enumerate(self._groups):
            if self._slots[first] == self._slots[slot]:
                return group
        return _index(self._groups, slot)

    def begin(self, inputs: ForwardInput, real: Tensor) -> PassState:
        """Reserve cells and compute what the layers share.

        Args:
            real: [B or 1, T] int64, `inputs.positions` with padding at 0.
        Raises: ContextLengthError before anything is written, if the cache has no room.
        """
        cache = self._uncached if inputs.cache is None else inputs.cache
        positions = inputs.positions
        step = cache.begin(
            positions, dense=inputs.dense, prefix_lengths=inputs.prefix_lengths, segments=inputs.segments
        )
        keys = [step.keys(slot) for slot in self._groups]
        masks = []
        if self._backend is not None:
            masks = [self._backend.prepare(spec, positions, keys[group]) for spec, group in self._masks]
        return PassState(
            cache,
            step,
            masks,
            [table.cos_sin(real) for table in self._tables],
            [relative_buckets(real, keys[g].positions, n, far, both) for n, far, both, g in self._buckets],
            [_temperature(real, scale, floor) for scale, floor in self._temperatures],
            [None] * len(self._slots),
        )


def _temperature(positions: Tensor, scale: float, floor: float) -> Tensor:
    """1 + scale * ln(1 + floor((position + 1) / floor)): Llama 4's `attn_temperature_tuning`; [B or 1, 1, T, 1]."""
    return (torch.log1p(torch.floor((positions.float() + 1.0) / floor)) * scale + 1.0)[:, None, :, None]


def _index(items: list[Item], item: Item) -> int:
    """The place of an equal item; appended if there is none."""
    if item not in items:
        items.append(item)
    return items.index(item)
