"""Between a cache and the field's older form: one pair (k, v) a layer, [B, K, S, D] and [B, K, S, Dv]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pluglm.errors import InputError

if TYPE_CHECKING:
    from pluglm.contracts.cache import Cache

#: Slots whose keys and values are all that they keep.
_PLAIN = ("chunk", "kv", "window")


def fill(cache: Cache, pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Put the keys and values of every layer into an empty cache, at positions 0 … S - 1: without padding.

    Raises: InputError for another number of layers, and for a model whose layers keep something else as well.
    """
    _check(cache, len(pairs))
    length = pairs[0][0].shape[2]
    step = cache.begin(torch.arange(length, device=pairs[0][0].device)[None], dense=True)
    for slot, (k, v) in enumerate(pairs):
        cache.append(slot, k, v, step)
    cache.commit(step)


def pairs_of(cache: Cache) -> tuple[tuple[Tensor, Tensor], ...]:
    """Copies of the keys and values of every layer. Raises InputError as `fill`."""
    _check(cache, len(cache.slots))
    views = (cache.read(slot).dense() for slot in range(len(cache.slots)))
    return tuple((k.clone(), v.clone()) for k, v in views)


def _check(cache: Cache, count: int) -> None:
    other = sorted({slot.kind for slot in cache.slots if slot.kind not in _PLAIN})
    if other or count != len(cache.slots):
        raise InputError(
            f"{count} pairs of keys and values are not a cache of this model.",
            why=f"it has {len(cache.slots)} layers" + (f", and slots of kind {', '.join(other)}." if other else "."),
            fix="Give one pair for each layer; keep other models' caches with `cache.inner.save(…)`.",
            argument="past_key_values",
        )  # fmt: skip
