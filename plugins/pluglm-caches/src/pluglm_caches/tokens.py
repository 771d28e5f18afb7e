"""Slots that keep one entry a cell: keys and values, or the latents of latent attention. They keep all of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pluglm.contracts import DenseView, KVSlot, LatentSlot, LatentView
from pluglm_caches.cells import Cells
from pluglm_caches.stores import Pass, Store, resized, taken, wrong_shape, zeros

_FIRST_ROOM = 64


class _Lie:
    """How a tensor's cells lie in its storage: what slices it by known strides, for half of what `narrow` costs.

    Attributes:
        head, tail: what stands before and behind the number of cells in a slice's shape.
        shape: the whole shape, of some number of cells: whoever slices says of how many, as a new list is slower.
        strides, base: of the tensor, and its own offset in the storage.
    """

    __slots__ = ("base", "head", "shape", "strides", "tail")

    def __init__(self, of: Tensor, axis: int) -> None:
        self.head, self.tail, self.shape = tuple(of.shape[:axis]), tuple(of.shape[axis + 1 :]), list(of.shape)
        self.strides, self.base = of.stride(), of.storage_offset()


class TokenStore(Store):
    """Two tensors with a cell axis, `axis`; `names` is what the two are called. The base class of stores of tokens.

    Args:
        first, second: their room is the cell axis; what they hold counts once it is committed.
        hint: cells that will be needed at most, as far as the caller knows: no room is made beyond them before.
    """

    axis: int
    names: tuple[str, str]
    #: Cells at the end of the tensors that are not for tokens of the text.
    spare = 0

    def __init__(self, first: Tensor, second: Tensor, *, hint: int | None = None) -> None:
        self.one, self.two = first, second
        self.dtype = first.dtype
        self.hint = hint
        self.room = first.shape[self.axis] - self.spare

    @property
    def one(self) -> Tensor:
        """The first of the two tensors."""
        return self._one

    @one.setter
    def one(self, tensor: Tensor) -> None:
        self._one, self._one_lies = tensor, _Lie(tensor, self.axis)

    @property
    def two(self) -> Tensor:
        """The second."""
        return self._two

    @two.setter
    def two(self, tensor: Tensor) -> None:
        self._two, self._two_lies = tensor, _Lie(tensor, self.axis)

    def view(self, one: Tensor, two: Tensor, /) -> Any:
        """What attention reads."""
        raise NotImplementedError

    def begin(self, cells: Cells, count: int) -> None:
        """Half as much room again as is needed, but no more than the caller said it would need at most."""
        needed = cells.length + count
        if needed <= self.room:
            return
        room = max(_FIRST_ROOM, needed + needed // 2)
        if self.hint is not None and needed <= self.hint:
            room = min(room, self.hint)
        self.grow(room, cells.length)

    def grow(self, room: int, held: int) -> None:
        """Larger tensors with the `held` first cells of these."""
        if self.two.shape[self.axis] < room:  # `two` is replaced last: a failure in between is made good here
            self.one = resized(self.one, self.axis, room, held)
            self.two = resized(self.two, self.axis, room, held)
        self.room = self.first + room - self.spare

    def write(self, k: Tensor, v: Tensor, current: Pass) -> Any:
        """Write both tensors, hand out what is held. A decode step has a way of its own: it runs for each layer."""
        cell, axis = current.cell, self.axis
        if cell is None or self.first:
            self.put(k, v, current.start - self.first, current.count)
            return self.read(self.first, current.end)
        one, two, a, b = self._one, self._two, self._one_lies, self._two_lies
        try:  # one call where a slice and a copy are two; it refuses other shapes and dtypes by itself
            one.index_copy_(axis, cell, k)
            two.index_copy_(axis, cell, v)
        except (RuntimeError, IndexError):
            self.check(k, v, 1)
            raise
        a.shape[axis] = b.shape[axis] = current.end
        return self.view(one.as_strided(a.shape, a.strides, a.base), two.as_strided(b.shape, b.strides, b.base))

    def put(self, one: Tensor, two: Tensor, at: int, count: int) -> None:
        """Write `count` cells from index `at` of the tensors on."""
        self.check(one, two, count)
        self.one.narrow(self.axis, at, count).copy_(one)
        self.two.narrow(self.axis, at, count).copy_(two)

    def check(self, one: Tensor, two: Tensor, count: int) -> None:
        """Raises InputError unless `one` and `two` are `count` cells of this slot."""
        a, b = self._one_lies, self._two_lies
        if one.shape != (*a.head, count, *a.tail) or one.dtype is not self.dtype:
            raise wrong_shape(self.names[0], one, (*a.head, count, *a.tail), self.dtype)
        if two.shape != (*b.head, count, *b.tail) or two.dtype is not self.dtype:
            raise wrong_shape(self.names[1], two, (*b.head, count, *b.tail), self.dtype)

    def read(self, start: int, end: int) -> Any:
        """Slices of the storage."""
        at, length = start - self.first, end - start
        return self.view(self.one.narrow(self.axis, at, length), self.two.narrow(self.axis, at, length))

    def tensors(self) -> list[Tensor]:
        return [self.one, self.two]

    def forget(self) -> None:
        self.first, self.room = 0, self.one.shape[self.axis] - self.spare

    def take_rows(self, index: Tensor, held: int) -> None:
        one, two = (taken(tensor, index, self.axis, held - self.first) for tensor in (self.one, self.two))
        self.one, self.two = one, two

    def copy(self) -> TokenStore:
        room = self.one.shape[self.axis]
        one, two = (resized(tensor, self.axis, room, room) for tensor in (self.one, self.two))
        twin = self.like(one, two)
        twin.first, twin.room = self.first, self.room
        return twin

    def like(self, one: Tensor, two: Tensor) -> TokenStore:
        """A store of the same kind around other tensors."""
        return type(self)(one, two, hint=self.hint)

    def crop(self, length: int) -> None:
        if not length:
            self.forget()

    def saved(self, held: int) -> dict[str, Tensor]:
        kept = held - self.first
        pair = zip(self.names, (self.one, self.two), strict=True)
        return {name: tensor.narrow(self.axis, 0, kept) for name, tensor in pair}

    def misfit(self, tensors: Mapping[str, Tensor], rows: int, held: int) -> str:
        if set(tensors) != set(self.names):
            return f"it has {sorted(tensors)} and needs {sorted(self.names)}"
        cells = tensors[self.names[0]].shape[self.axis] if tensors[self.names[0]].ndim > self.axis else -1
        if not self.suffices(cells, held):
            return f"it holds {cells} of {held} cells, and this layout needs more of them"
        for name, kept in zip(self.names, (self.one, self.two), strict=True):
            wanted = [rows, *kept.shape[1:]]
            wanted[self.axis] = cells
            if list(tensors[name].shape) != wanted or tensors[name].dtype is not kept.dtype:
                return f"{name} is {list(tensors[name].shape)} {tensors[name].dtype}, not {wanted} {kept.dtype}"
        return ""

    def suffices(self, cells: int, held: int) -> bool:
        """Whether a file's last `cells` of `held` cells are all that this store must have."""
        return cells == held

    def restore(self, tensors: Mapping[str, Tensor], held: int) -> None:
        cells = tensors[self.names[0]].shape[self.axis]
        self.first = held - cells
        self.grow(max(cells + self.spare, self.one.shape[self.axis]), 0)
        for name, kept in zip(self.names, (self.one, self.two), strict=True):
            kept.narrow(self.axis, 0, cells).copy_(tensors[name])


class KVStore(TokenStore):
    """Keys [B, K, room, D] and values [B, K, room, Dv]."""

    kind = "kv"
    axis = 2
    names = ("k", "v")

    @classmethod
    def empty(cls, slot: KVSlot, rows: int, room: int, dtype: torch.dtype, device: torch.device, **how: Any) -> KVStore:
        """Storage for one attention layer. how: as in `TokenStore`."""
        k = zeros((rows, slot.num_kv_heads, room, slot.head_dim), dtype, device)
        return cls(k, zeros((rows, slot.num_kv_heads, room, slot.v_head_dim), dtype, device), **how)

    view = staticmethod(DenseView)  # not a method around it: that would be a call more for each layer and token


class LatentStore(TokenStore):
    """Rotary key parts [B, room, rope_dim] and compressed vectors [B, room, latent_dim]."""

    kind = "latent"
    axis = 1
    names = ("rope", "latent")

    @classmethod
    def empty(
        cls, slot: LatentSlot, rows: int, room: int, dtype: torch.dtype, device: torch.device, **how: Any
    ) -> LatentStore:
        """Storage for one latent-attention layer. how: as in `TokenStore`."""
        rope = zeros((rows, room, slot.rope_dim), dtype, device)
        return cls(rope, zeros((rows, room, slot.latent_dim), dtype, device), **how)

    def view(self, one: Tensor, two: Tensor) -> LatentView:
        return LatentView(latent=two, rope=one)
