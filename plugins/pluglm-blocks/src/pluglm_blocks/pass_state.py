"""What the layers of one forward pass share, each computed once: masks, rotations, buckets, the cache's step.

`PassPlan` is filled while the layers are built: each asks for what it needs and remembers an index, equal requests get
the same one. `PassPlan.begin` computes them for one pass; layers read by index, nothing is looked up by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from pluglm.contracts import (
    AttentionBackend,
    AttentionSpec,
    Cache,
    ForwardInput,
    KVView,
    Rope,
    SharedSlot,
    Slot,
    StateSlot,
    Step,
)
from pluglm.errors import InputError
from pluglm_blocks.ragged import Ragged
from pluglm_blocks.relative import relative_buckets
from pluglm_blocks.rope import RotaryTable
from pluglm_blocks.uncached import Uncached

Item = TypeVar("Item")
#: (T new tokens, S keys) -> whether a pass of these sizes needs something. Equal conditions count as one.
Condition = Callable[[int, int], bool]


@dataclass(slots=True)
class PassState:
    """One pass.

    Attributes:
        cache, step: where new keys go.
        masks: one for each distinct (spec, slot geometry, condition), as the backend made them; None where the
            condition does not hold.
        rotations: (cos, sin) [B or 1, T, dim/2] float32 for each distinct rope.
        buckets: [B or 1, T, S] int64. temperatures: [B or 1, 1, T, 1] float32, factors on queries.
        views: by slot, the keys and values that a later layer shares; None where none does.
        ragged: where the real tokens are, for layers with a state. None: known to have no padding, or no such layer.
    """

    cache: Cache | Uncached
    step: Step
    masks: list[Any]
    rotations: list[tuple[Tensor, Tensor]]
    buckets: list[Tensor]
    temperatures: list[Tensor]
    views: list[KVView | None]
    ragged: Ragged | None = None


class PassPlan:
    """What to compute once a pass."""

    def __init__(self, slots: Sequence[Slot], backend: AttentionBackend | None) -> None:
        self._slots, self._backend = tuple(slots), backend
        self._groups: list[int] = []  # the first slot of each geometry: equal slots hand out equal keys
        self._masks: list[tuple[AttentionSpec, int, Condition | None]] = []
        self._buckets: list[tuple[int, int, bool, int]] = []
        self._ropes: list[Rope] = []
        self._tables: list[RotaryTable] = []
        self._temperatures: list[tuple[float, float]] = []
        self._uncached = Uncached(self._slots)

    def source(self, slot: int) -> int:
        """The slot that holds what `slot` hands out: itself, unless it is shared."""
        found = self._slots[slot]
        return found.source if isinstance(found, SharedSlot) else slot

    def is_shared(self, slot: int) -> bool:
        """Whether another slot reads this one."""
        return any(isinstance(other, SharedSlot) and other.source == slot for other in self._slots)

    def mask(self, spec: AttentionSpec, slot: int, when: Condition | None = None) -> int:
        """Index in `PassState.masks`. when: in which passes the layer attends with this spec; None: in all of them."""
        return _index(self._masks, (spec, self._group(slot), when))

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

    def _ragged(self, inputs: ForwardInput) -> Ragged | None:
        if not any(isinstance(slot, StateSlot) for slot in self._slots):
            return None
        if inputs.segments is not None:
            raise InputError(
                "This model cannot take packed sequences.",
                why="its states run on from one segment of a row into the next.",
                fix="Give each sequence a row of its own, padded to one length.",
                argument="segments",
            )
        return None if inputs.dense else Ragged.of(inputs.positions)

    def begin(self, inputs: ForwardInput, real: Tensor) -> PassState:
        """Reserve cells and compute what the layers share.

        Args:
            real: [B or 1, T] int64, `inputs.positions` with padding at 0.
        Raises: ContextLengthError before anything is written, if the cache has no room; InputError for packed sequences
            where a layer has a state.
        """
        cache = self._uncached if inputs.cache is None else inputs.cache
        positions = inputs.positions
        ragged = self._ragged(inputs)
        step = cache.begin(
            positions, dense=inputs.dense, prefix_lengths=inputs.prefix_lengths, segments=inputs.segments
        )
        keys = [step.keys(slot) for slot in self._groups]
        masks: list[Any] = []
        if self._backend is not None:
            T = positions.shape[1]
            for spec, group, when in self._masks:
                needed = when is None or when(T, keys[group].length)
                masks.append(self._backend.prepare(spec, positions, keys[group]) if needed else None)
        return PassState(
            cache,
            step,
            masks,
            [table.cos_sin(real) for table in self._tables],
            [relative_buckets(real, keys[g].positions, n, far, both) for n, far, both, g in self._buckets],
            [_temperature(real, scale, floor) for scale, floor in self._temperatures],
            [None] * len(self._slots),
            ragged,
        )


def _temperature(positions: Tensor, scale: float, floor: float) -> Tensor:
    """1 + scale * ln(1 + floor((position + 1) / floor)): Llama 4's `attn_temperature_tuning`; [B or 1, 1, T, 1]."""
    return (torch.log1p(torch.floor((positions.float() + 1.0) / floor)) * scale + 1.0)[:, None, :, None]


def _index(items: list[Item], item: Item) -> int:
    """The place of an equal item; appended if there is none."""
    if item not in items:
        items.append(item)
    return items.index(item)
