"""The layouts `dynamic` and `static`: what they refuse, and how they make a cache for each slot of a model."""

from __future__ import annotations

import torch

from pluglm.contracts import (
    OPERATIONS,
    CacheRequest,
    CrossSlot,
    DenseView,
    KVSlot,
    LatentSlot,
    SharedSlot,
    Slot,
    StateSlot,
)
from pluglm.contracts.cache import missing_operations
from pluglm.contracts.dtypes import torch_dtype
from pluglm.errors import InputError, UnsupportedRequestError
from pluglm_caches.cache import DenseCache
from pluglm_caches.states import CrossStore, StateStore
from pluglm_caches.stores import Store
from pluglm_caches.tokens import KVStore, LatentStore

KINDS = ("chunk", "cross", "kv", "latent", "shared", "state", "window")


def offered(slots: tuple[Slot, ...]) -> frozenset[str]:
    """What caches of these slots can do: a recurrent state cannot give back a token."""
    recurrent = any(isinstance(slot, StateSlot) for slot in slots)
    return frozenset(OPERATIONS) - ({"crop", "rollback"} if recurrent else set())


def refusals(request: CacheRequest) -> list[str]:
    """Every reason why a dense layout cannot honour `request`."""
    slots = request.slots
    reasons = [
        f"slot {i} is of kind {slot.kind!r}, which it does not make"
        for i, slot in enumerate(slots)
        if slot.kind not in KINDS
    ]
    for i, slot in enumerate(slots):
        if isinstance(slot, SharedSlot):
            source = slots[slot.source] if 0 <= slot.source < len(slots) else None
            if not isinstance(source, KVSlot | LatentSlot):
                reasons.append(f"slot {i} shares slot {slot.source}, which keeps no keys and values of its own")
    keyed = any(isinstance(slot, KVSlot | CrossSlot) for slot in slots)
    if keyed and DenseView.kind not in request.views:
        reasons.append(f"it gives the view 'dense', and the attention backend reads {list(request.views)}")
    if missing := missing_operations(request.operations, offered(slots)):
        reasons.append(f"it has no {', '.join(missing)} for this model (recurrent states cannot give back a token)")
    if not torch_dtype(request.dtype).is_floating_point:
        reasons.append(f"it stores floating-point numbers, not {request.dtype}")
    if request.variant is not None:
        reasons.append(f"it has no variants, so not {request.variant!r}")
    reasons += [f"it has no option {name!r}" for name, _ in request.options]
    return reasons


class DenseLayout:
    """Makes caches of one of the two layouts for one model."""

    view = "dense"

    def __init__(self, name: str, request: CacheRequest) -> None:
        self.name, self.slots = name, request.slots
        self.operations = offered(request.slots)
        self.dtype, self.device = torch_dtype(request.dtype), torch.device(request.device)

    def new(self, *, batch_size: int, capacity: int | None = None) -> DenseCache:
        """An empty cache. `static` allocates `capacity` cells; `dynamic` keeps its spare room below it."""
        if batch_size < 1:
            raise InputError(f"batch_size={batch_size}: a cache has at least one row.", argument="batch_size")
        if capacity is not None and capacity < 1:
            raise InputError(f"capacity={capacity}: a cache holds at least one cell.", argument="capacity")
        fixed = self.name == "static"
        if fixed and capacity is None:
            raise InputError(
                "A static cache must be told its capacity.",
                why="its storage is allocated once, when it is made.",
                fix='Call `new(batch_size=…, capacity=prompt + new tokens)`, or choose cache="dynamic".',
                argument="capacity",
            )
        room = capacity if fixed and capacity is not None else 0
        return DenseCache(
            self.name, self.slots, [self._store(slot, batch_size, room) for slot in self.slots], self.operations,
            batch_size=batch_size, device=self.device,
            capacity=capacity if fixed else None, hint=None if fixed else capacity,
        )  # fmt: skip

    def _store(self, slot: Slot, rows: int, room: int) -> Store:
        if isinstance(slot, KVSlot):
            return KVStore.empty(slot, rows, room, self.dtype, self.device)
        if isinstance(slot, LatentSlot):
            return LatentStore.empty(slot, rows, room, self.dtype, self.device)
        if isinstance(slot, StateSlot):
            return StateStore.empty(slot, rows, self.dtype, self.device)
        if isinstance(slot, CrossSlot):
            return CrossStore(slot, self.dtype, self.device)
        return Store()


def build(name: str, request: CacheRequest) -> DenseLayout:
    """The layout `name` for `request`. Raises UnsupportedRequestError with every reason."""
    if reasons := refusals(request):
        raise UnsupportedRequestError(
            f'cache="{name}" cannot serve this model.',
            why="\n".join(reasons),
            fix="Choose another cache layout, or another part that asks less of it.",
            reasons=reasons,
        )
    return DenseLayout(name, request)
