"""The layout `offloaded`: cells live on the host, for texts that no other memory can hold.

For an accelerator they live in pinned memory and come to it one layer at a time, while the layer before computes
(Sheng et al. 2023, "FlexGen", section 4.1, overlaps transfers so). On a CPU they live in a file mapped into memory.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from pluglm.contracts import KVSlot, LatentSlot, SharedSlot
from pluglm_caches.cache import CachePass, SlotCache
from pluglm_caches.layout import Layout
from pluglm_caches.offloaded_store import OffloadedKV, OffloadedLatent, OffloadedStore
from pluglm_caches.shelves import MappedShelf, PinnedShelf, Shelf
from pluglm_caches.staging import CudaStreams, Staging, Streams


class OffloadedCache(SlotCache):
    """See `SlotCache`. staging: buffers on the accelerator; None: views are the host's."""

    def __init__(self, *args: Any, staging: Staging | None, **how: Any) -> None:
        super().__init__(*args, **how)
        self.staging = staging
        self._link()

    def _link(self) -> None:
        """Tell every store which one comes after it."""
        self._moved = [store for store in self._stores if isinstance(store, OffloadedStore)]
        for at, store in enumerate(self._moved):
            store.staging = self.staging
            store.following = self._moved[at + 1] if at + 1 < len(self._moved) else None

    @property
    def nbytes(self) -> int:
        """Bytes of storage held, spare room, files and buffers on the accelerator included."""
        buffers = self.staging.tensors() if self.staging is not None else ()
        return super().nbytes + sum(tensor.untyped_storage().nbytes() for tensor in buffers)

    def begin(self, positions: Tensor, **how: Any) -> CachePass:
        """As in the contract; the first layer's cells set out."""
        step = super().begin(positions, **how)
        if self.staging is not None and self._moved:
            self.staging.fetch(self._moved[0].slot, self._moved[0].cells, step)
        return step

    def fork(self) -> OffloadedCache:
        """A deep copy, made now, in files or memory of its own."""
        twin = cast(OffloadedCache, super().fork())
        twin.staging = None if self.staging is None else self.staging.another()
        twin._link()
        return twin


class Offloaded(Layout):
    """Every cell on the host. States and the encoder's keys, whose size does not follow the text's, are not moved.

    Options: folder: where the files of a cache on a CPU are made; "": where the system makes temporary files.
    """

    options = {"folder": ""}  # noqa: RUF012 - declared ClassVar in the base class

    def refusals(self) -> list[str]:
        """As in `Layout`; and a device or a folder with which it can do nothing."""
        reasons, device = super().refusals(), torch.device(self.request.device).type
        folder = dict(self.request.options).get("folder", "")
        if device not in ("cpu", "cuda"):
            reasons.append(f"it moves cells to files on a CPU and beside CUDA devices to the host; not on {device!r}")
        if device == "cpu" and not hasattr(os, "posix_fallocate"):
            reasons.append("this system has no posix_fallocate to reserve a file's space, and a full disk would end us")
        if device != "cpu" and folder:
            reasons.append(f"its option folder is for a CPU; for {device!r} cells are in pinned memory")
        if device == "cpu" and isinstance(folder, str):
            path = Path(folder or tempfile.gettempdir())
            if not (path.is_dir() and os.access(path, os.W_OK)):
                reasons.append(f"its option folder is {folder!r}, which is no folder that may be written to")
        return reasons

    def shelf(self) -> Shelf:
        """Of one slot."""
        return MappedShelf(str(self.settings["folder"])) if self.device.type == "cpu" else PinnedShelf()

    def copies(self) -> Streams | None:
        """What copies to the accelerator; None: there is none."""
        return None if self.device.type == "cpu" else CudaStreams(self.device)

    def new(self, *, batch_size: int, capacity: int | None = None) -> OffloadedCache:
        """An empty cache. `capacity` only bounds spare room."""
        plain = super().new(batch_size=batch_size, capacity=capacity)  # checked, with every slot that is not moved
        streams, staging = self.copies(), None
        if streams is not None:
            moved = [i for i, slot in enumerate(self.slots) if isinstance(slot, KVSlot | LatentSlot)]
            shared = frozenset(slot.source for slot in self.slots if isinstance(slot, SharedSlot))
            staging = Staging(moved, shared, streams, self.dtype, self.device)
        stores = list(plain._stores)
        for i, slot in enumerate(self.slots):
            if isinstance(slot, KVSlot):
                head = (batch_size, slot.num_kv_heads)
                shapes = ((*head, slot.head_dim), (*head, slot.v_head_dim))
                stores[i] = OffloadedKV(shapes, self.dtype, self.shelf(), hint=capacity, slot=i)
            elif isinstance(slot, LatentSlot):
                parts = ((batch_size, slot.rope_dim), (batch_size, slot.latent_dim))
                stores[i] = OffloadedLatent(parts, self.dtype, self.shelf(), hint=capacity, slot=i)
        return OffloadedCache(
            self.name, self.slots, stores, self.operations, batch_size=batch_size, device=self.device, staging=staging
        )
