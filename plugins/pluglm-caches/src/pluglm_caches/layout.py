"""What every layout here shares: what it refuses, and how it makes a cache. A layout is a choice of stores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from pluglm.contracts import OPERATIONS, CacheRequest, CrossSlot, KVSlot, LatentSlot, SharedSlot, Slot, StateSlot
from pluglm.contracts.cache import missing_operations
from pluglm.contracts.dtypes import torch_dtype
from pluglm.errors import InputError, UnsupportedRequestError
from pluglm_caches.cache import SlotCache
from pluglm_caches.states import CrossStore, StateStore
from pluglm_caches.stores import Store
from pluglm_caches.tokens import KVStore, LatentStore

EVERY_KIND = ("chunk", "cross", "kv", "latent", "shared", "state", "window")


class Layout:
    """One layout for one model. A subclass says which store a slot of keys and values gets.

    Attributes:
        kinds: slots it makes. view: what its slots of keys and values hand out. streams: as in the contract.
        options: name -> (default, least value) of a whole number, or the default of a text.
        fixed: storage is made once, so `new` must be told the capacity.
    """

    kinds: ClassVar[tuple[str, ...]] = EVERY_KIND
    view: str = "dense"
    streams: bool = False
    options: ClassVar[Mapping[str, tuple[int, int] | str]] = {}
    variants: ClassVar[tuple[str, ...]] = ()
    fixed: ClassVar[bool] = False

    def __init__(self, name: str, request: CacheRequest) -> None:
        self.name, self.slots, self.request = name, request.slots, request
        self.operations = self.offered()
        if reasons := self.refusals():
            raise UnsupportedRequestError(
                f'cache="{name}" cannot serve this model.',
                why="\n".join(reasons),
                fix="Choose another cache layout, or another part that asks less of it.",
                reasons=reasons,
            )
        self.dtype, self.device = torch_dtype(request.dtype), torch.device(request.device)
        defaults = {key: known if isinstance(known, str) else known[0] for key, known in self.options.items()}
        self.settings: dict[str, Any] = defaults | dict(request.options)

    def offered(self) -> frozenset[str]:
        """What caches of these slots can do: a recurrent state cannot give back a token."""
        recurrent = any(isinstance(slot, StateSlot) for slot in self.slots)
        return frozenset(OPERATIONS) - ({"crop", "rollback"} if recurrent else set())

    def refusals(self) -> list[str]:
        """Every reason why this layout cannot honour the request."""
        request, slots = self.request, self.slots
        reasons = [
            f"slot {i} is of kind {slot.kind!r}, which it does not make"
            for i, slot in enumerate(slots)
            if slot.kind not in self.kinds
        ]
        for i, slot in enumerate(slots):
            if isinstance(slot, SharedSlot):
                source = slots[slot.source] if 0 <= slot.source < len(slots) else None
                if not isinstance(source, KVSlot | LatentSlot):
                    reasons.append(f"slot {i} shares slot {slot.source}, which keeps no keys and values of its own")
        keyed = any(isinstance(slot, KVSlot | CrossSlot) for slot in slots)
        if keyed and self.view not in request.views:
            reasons.append(f"it gives the view {self.view!r}, and the attention backend reads {list(request.views)}")
        if missing := missing_operations(request.operations, self.operations):
            reasons.append(f"it has no {', '.join(missing)} for this model (recurrent states cannot give back a token)")
        if not torch_dtype(request.dtype).is_floating_point:
            reasons.append(f"it stores floating-point numbers, not {request.dtype}")
        if request.variant is not None and request.variant not in self.variants:
            known = f"only {', '.join(self.variants)}" if self.variants else "no variants"
            reasons.append(f"it has {known}, so not {request.variant!r}")
        return reasons + [reason for name, value in request.options if (reason := self._misfit(name, value))]

    def _misfit(self, name: str, value: Any) -> str:
        if name not in self.options:
            return f"it has no option {name!r}, only {', '.join(sorted(self.options)) or 'none at all'}"
        known = self.options[name]
        if isinstance(known, str):
            return "" if isinstance(value, str) else f"its option {name} is a text, not {value!r}"
        least = known[1]
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
        return "" if fits else f"its option {name} is a whole number from {least} on, not {value!r}"

    def new(self, *, batch_size: int, capacity: int | None = None) -> SlotCache:
        """An empty cache. A layout with fixed storage allocates `capacity` cells; others keep spare room below it."""
        if type(batch_size) is not int or batch_size < 1:
            raise InputError(f"batch_size={batch_size!r}: a cache has at least one row.",
                             fix="Pass the number of rows as an integer.", argument="batch_size")  # fmt: skip
        if capacity is not None and (type(capacity) is not int or capacity < 1):
            raise InputError(f"capacity={capacity!r}: a cache holds at least one cell.",
                             fix="Pass the number of cells as an integer, or leave it out.",
                             argument="capacity")  # fmt: skip
        if self.fixed and capacity is None:
            raise InputError(
                f"A {self.name} cache must be told its capacity.",
                why="its storage is allocated once, when it is made.",
                fix='Call `new(batch_size=…, capacity=prompt + new tokens)`, or choose cache="dynamic".',
                argument="capacity",
            )
        return SlotCache(
            self.name, self.slots, [self._store(slot, batch_size, capacity) for slot in self.slots], self.operations,
            batch_size=batch_size, device=self.device, capacity=capacity if self.fixed else None,
            streams=self.streams,
        )  # fmt: skip

    def _store(self, slot: Slot, rows: int, capacity: int | None) -> Store:
        if isinstance(slot, KVSlot):
            return self.kv_store(slot, rows, capacity)
        if isinstance(slot, LatentSlot):
            return self.latent_store(slot, rows, capacity)
        if isinstance(slot, StateSlot):
            return StateStore.empty(slot, rows, self.dtype, self.device)
        if isinstance(slot, CrossSlot):
            return CrossStore(slot, self.dtype, self.device)
        return Store()

    def kv_store(self, slot: KVSlot, rows: int, capacity: int | None) -> Store:
        """The store of one slot of keys and values. Here: all of them, with room that grows, or never does."""
        room = capacity if self.fixed and capacity is not None else 0
        return KVStore.empty(slot, rows, room, self.dtype, self.device, hint=capacity)

    def latent_store(self, slot: LatentSlot, rows: int, capacity: int | None) -> Store:
        """The store of one slot of latents; as `kv_store`."""
        room = capacity if self.fixed and capacity is not None else 0
        return LatentStore.empty(slot, rows, room, self.dtype, self.device, hint=capacity)
