"""Slots that keep one entry a cell: keys and values, or the latents of latent attention."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pluglm.contracts import DenseView, KVSlot, LatentSlot, LatentView
from pluglm_caches.stores import Store, resized, taken, wrong_shape, zeros


class TokenStore(Store):
    """Two tensors with a cell axis. `axis` is where the cells are counted, `names` what the two are called."""

    axis: int
    names: tuple[str, str]

    def __init__(self, first: Tensor, second: Tensor) -> None:
        self.first, self.second = first, second
        self.dtype = first.dtype
        self._count = -1  # T that the two shapes below are for: built once for a run of decode steps
        self._first_shape: tuple[int, ...] = ()
        self._second_shape: tuple[int, ...] = ()

    def put(self, first: Tensor, second: Tensor, start: int, count: int) -> None:
        """Check both tensors, then write both."""
        if count != self._count:
            self._expect(count)
        if first.shape != self._first_shape or first.dtype is not self.dtype:
            raise wrong_shape(self.names[0], first, self._first_shape, self.dtype)
        if second.shape != self._second_shape or second.dtype is not self.dtype:
            raise wrong_shape(self.names[1], second, self._second_shape, self.dtype)
        self.first.narrow(self.axis, start, count).copy_(first)
        self.second.narrow(self.axis, start, count).copy_(second)

    def _expect(self, count: int) -> None:
        def shape(kept: Tensor) -> tuple[int, ...]:
            return (*kept.shape[: self.axis], count, *kept.shape[self.axis + 1 :])

        self._first_shape, self._second_shape, self._count = shape(self.first), shape(self.second), count

    def tensors(self) -> list[Tensor]:
        return [self.first, self.second]

    def reserve(self, room: int, held: int) -> None:
        if self.second.shape[self.axis] < room:  # `second` is replaced last: a failure in between is made good here
            self.first = resized(self.first, self.axis, room, held)
            self.second = resized(self.second, self.axis, room, held)

    def take_rows(self, index: Tensor, held: int) -> None:
        first, second = (taken(tensor, index, self.axis, held) for tensor in self.tensors())
        self.first, self.second, self._count = first, second, -1

    def copy(self) -> TokenStore:
        room = self.first.shape[self.axis]
        return type(self)(*(resized(tensor, self.axis, room, room) for tensor in self.tensors()))

    def saved(self, held: int) -> dict[str, Tensor]:
        return {name: t.narrow(self.axis, 0, held) for name, t in zip(self.names, self.tensors(), strict=True)}

    def misfit(self, tensors: Mapping[str, Tensor], rows: int, held: int) -> str:
        if set(tensors) != set(self.names):
            return f"it has {sorted(tensors)} and needs {sorted(self.names)}"
        for name, kept in zip(self.names, self.tensors(), strict=True):
            wanted = [rows, *kept.shape[1:]]
            wanted[self.axis] = held
            if list(tensors[name].shape) != wanted or tensors[name].dtype is not kept.dtype:
                return f"{name} is {list(tensors[name].shape)} {tensors[name].dtype}, not {wanted} {kept.dtype}"
        return ""

    def restore(self, tensors: Mapping[str, Tensor], held: int) -> None:
        for name, kept in zip(self.names, self.tensors(), strict=True):
            kept.narrow(self.axis, 0, held).copy_(tensors[name])


class KVStore(TokenStore):
    """Keys [B, K, room, D] and values [B, K, room, Dv]."""

    kind = "kv"
    axis = 2
    names = ("k", "v")

    @classmethod
    def empty(cls, slot: KVSlot, rows: int, room: int, dtype: torch.dtype, device: torch.device) -> KVStore:
        """Storage for one attention layer."""
        k = zeros((rows, slot.num_kv_heads, room, slot.head_dim), dtype, device)
        return cls(k, zeros((rows, slot.num_kv_heads, room, slot.v_head_dim), dtype, device))

    def write(self, k: Tensor, v: Tensor, start: int, count: int) -> DenseView:
        self.put(k, v, start, count)
        return DenseView(self.first.narrow(2, 0, start + count), self.second.narrow(2, 0, start + count))

    def read(self, end: int) -> DenseView:
        return DenseView(self.first.narrow(2, 0, end), self.second.narrow(2, 0, end))


class LatentStore(TokenStore):
    """Rotary key parts [B, room, rope_dim] and compressed vectors [B, room, latent_dim]."""

    kind = "latent"
    axis = 1
    names = ("rope", "latent")

    @classmethod
    def empty(cls, slot: LatentSlot, rows: int, room: int, dtype: torch.dtype, device: torch.device) -> LatentStore:
        """Storage for one latent-attention layer."""
        rope = zeros((rows, room, slot.rope_dim), dtype, device)
        return cls(rope, zeros((rows, room, slot.latent_dim), dtype, device))

    def write(self, k: Tensor, v: Tensor, start: int, count: int) -> LatentView:
        self.put(k, v, start, count)
        return self.read(start + count)

    def read(self, end: int) -> LatentView:
        return LatentView(latent=self.second.narrow(1, 0, end), rope=self.first.narrow(1, 0, end))
