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


class _Cut:
    """How `count` cells of a tensor lie in its storage.

    Attributes:
        shape: of these cells; head and tail: what stands before and behind their number in it.
        strides: of the tensor. base: its own offset in the storage. step: elements from one cell to the next.
    """

    __slots__ = ("base", "count", "head", "of", "shape", "step", "strides", "tail")

    def __init__(self, of: Tensor, axis: int, count: int) -> None:
        self.of, self.count = of, count
        self.head, self.tail = tuple(of.shape[:axis]), tuple(of.shape[axis + 1 :])
        self.shape = (*self.head, count, *self.tail)
        self.strides, self.base = of.stride(), of.storage_offset()
        self.step = self.strides[axis]


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
        #: How a pass's cells lie in each tensor: worked out once for a run of decode steps.
        self._cuts: tuple[_Cut, _Cut] | None = None
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
        self._one, self._cuts = tensor, None

    @property
    def two(self) -> Tensor:
        """The second."""
        return self._two

    @two.setter
    def two(self, tensor: Tensor) -> None:
        self._two, self._cuts = tensor, None

    def view(self, one: Tensor, two: Tensor) -> Any:
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
        """Check both tensors, then write both. `put` and `read` in one: it runs for each layer and token."""
        count = current.count
        cut_one, cut_two = self.check(k, v, count)
        at = current.start - self.first
        end = at + count
        if torch.is_grad_enabled():
            one, two, axis = self.one, self.two, self.axis
            one.narrow(axis, at, count).copy_(k)
            two.narrow(axis, at, count).copy_(v)
            return self.view(one.narrow(axis, 0, end), two.narrow(axis, 0, end))
        # The same slices by strides that are known: without a graph to keep, half of what `narrow` costs.
        cut_one.of.as_strided(cut_one.shape, cut_one.strides, cut_one.base + at * cut_one.step).copy_(k)
        cut_two.of.as_strided(cut_two.shape, cut_two.strides, cut_two.base + at * cut_two.step).copy_(v)
        return self.view(
            cut_one.of.as_strided((*cut_one.head, end, *cut_one.tail), cut_one.strides, cut_one.base),
            cut_two.of.as_strided((*cut_two.head, end, *cut_two.tail), cut_two.strides, cut_two.base),
        )

    def put(self, one: Tensor, two: Tensor, at: int, count: int) -> None:
        """Write `count` cells from index `at` of the tensors on."""
        self.check(one, two, count)
        self.one.narrow(self.axis, at, count).copy_(one)
        self.two.narrow(self.axis, at, count).copy_(two)

    def check(self, one: Tensor, two: Tensor, count: int) -> tuple[_Cut, _Cut]:
        """How `count` cells lie in both tensors. Raises InputError unless `one` and `two` are that many of a slot."""
        cuts = self._cuts
        if cuts is None or cuts[0].count != count:
            cuts = self._cuts = _Cut(self.one, self.axis, count), _Cut(self.two, self.axis, count)
        cut_one, cut_two = cuts
        if one.shape != cut_one.shape or one.dtype is not self.dtype:
            raise wrong_shape(self.names[0], one, cut_one.shape, self.dtype)
        if two.shape != cut_two.shape or two.dtype is not self.dtype:
            raise wrong_shape(self.names[1], two, cut_two.shape, self.dtype)
        return cuts

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

    def view(self, one: Tensor, two: Tensor) -> DenseView:
        return DenseView(one, two)


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
