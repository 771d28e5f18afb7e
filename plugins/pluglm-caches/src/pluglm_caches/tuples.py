"""Between a cache and the field's older form: one pair (k, v) a layer, [B, K, S, D] and [B, K, S, Dv]."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pluglm.contracts import Cache, CacheLayout, KVSlot, Slot
from pluglm.errors import InputError


def from_tuples(
    layout: CacheLayout,
    pairs: Sequence[tuple[Tensor, Tensor]],
    *,
    positions: Tensor | None = None,
    capacity: int | None = None,
) -> Cache:
    """A cache of any layout with the keys and values of every layer.

    Args:
        pairs: k and v of each slot, in order. At least one.
        positions: [B, S] or [1, S] int64, negative: padding. None: 0 … S - 1 in every row.
        capacity: as for `layout.new`; None: what the pairs need.
    Raises: InputError if the model's slots are not all kv, window or chunk, or the pairs are not one for each.
    """
    if not pairs:
        raise InputError("There are no pairs to make a cache of.", argument="pairs")
    batch_size, _, length, _ = pairs[0][0].shape
    cache = layout.new(batch_size=batch_size, capacity=max(capacity or 1, length))
    _check_slots(cache.slots, len(pairs))
    dense = positions is None
    if positions is None:
        positions = torch.arange(length, device=pairs[0][0].device)[None]
    step = cache.begin(positions, dense=dense)
    for slot, (k, v) in enumerate(pairs):
        cache.append(slot, k, v, step)
    cache.commit(step)
    return cache


def to_tuples(cache: Cache) -> tuple[tuple[Tensor, Tensor], ...]:
    """Copies of the committed keys and values of every slot. Positions are not part of this form: see `save`."""
    _check_slots(cache.slots, len(cache.slots))
    views = (cache.read(slot).dense() for slot in range(len(cache.slots)))
    return tuple((k.clone(), v.clone()) for k, v in views)


def _check_slots(slots: Sequence[Slot], num_pairs: int) -> None:
    other = [f"slot {i}: {slot.kind}" for i, slot in enumerate(slots) if not isinstance(slot, KVSlot)]
    if other or num_pairs != len(slots):
        raise InputError(
            f"{num_pairs} pairs of keys and values are not a cache of this model.",
            why=f"it has {len(slots)} slots; without keys and values of their own: {', '.join(other) or 'none'}.",
            fix="Give one pair for each slot, in order; keep other kinds of slots with `cache.save`.",
            argument="pairs",
        )
