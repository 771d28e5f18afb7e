"""Slots whose cells are on the host: read there, or in buffers on an accelerator that they pass through."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pluglm.errors import InputError
from pluglm_caches.shelves import Shelf
from pluglm_caches.staging import Staging
from pluglm_caches.stores import Pass, zeros
from pluglm_caches.tokens import KVStore, LatentStore, TokenStore

_AT_A_TIME = 1024  # cells that are copied through memory together


class OffloadedStore(TokenStore):
    """Both tensors of one slot in one tensor of a shelf, [room, numbers of a cell]; `one` and `two` are views of it.

    Args:
        shapes: of one cell, in each tensor, rows first.
        staging: where views come from, if that is not the shelf. slot: its number there.
    """

    def __init__(
        self, shapes: tuple[tuple[int, ...], tuple[int, ...]], dtype: torch.dtype, shelf: Shelf, *, hint: int | None,
        staging: Staging | None = None, slot: int = -1,
    ) -> None:  # fmt: skip
        self.shapes, self.shelf, self.staging, self.slot = shapes, shelf, staging, slot
        numbers = sum(math.prod(shape) for shape in shapes)
        self.cells = zeros((0, numbers), dtype, torch.device("cpu"))
        super().__init__(*self._pair(self.cells), hint=hint)
        #: The store whose cells are fetched while this one's layer computes.
        self.following: OffloadedStore | None = None

    def _pair(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """The two tensors of the contract in a tensor of cells: in its storage, but to gradients no views of it."""
        first = int(cells.storage_offset())
        second = first + math.prod(self.shapes[0])
        return self._within(cells, first, self.shapes[0]), self._within(cells, second, self.shapes[1])

    def _within(self, cells: Tensor, start: int, shape: tuple[int, ...]) -> Tensor:
        """[rows, …, cells, …]: in every cell, the numbers from `start` on."""
        strides = [math.prod(shape[at + 1 :]) for at in range(len(shape))]
        size = (*shape[: self.axis], cells.shape[0], *shape[self.axis :])
        steps = (*strides[: self.axis], cells.stride(0), *strides[self.axis :])
        with torch.inference_mode(False):
            return torch.empty(0, dtype=cells.dtype, device=cells.device).set_(
                cells.untyped_storage(), start, size, steps
            )

    def _adopt(self, cells: Tensor) -> None:
        self.cells = cells
        self.one, self.two = self._pair(cells)
        self.room = cells.shape[0]

    def grow(self, room: int, held: int) -> None:
        """On the shelf; a file does not move."""
        self._finish()
        if room != self.cells.shape[0]:
            self._adopt(self.shelf.resized(self.cells, room, held))
        self.room = room

    def _finish(self) -> None:
        """Copies that are under way end; then the host may look."""
        if self.staging is not None:
            self.staging.forget()

    # A pass

    def write(self, k: Tensor, v: Tensor, current: Pass) -> Any:
        """On an accelerator: beside the cells that arrived from the host, and from there to the host."""
        staging = self.staging
        if staging is None:
            return super().write(k, v, current)
        self.check(k, v, current.count)
        if torch.is_grad_enabled() and (k.requires_grad or v.requires_grad):
            raise InputError(
                "An offloaded cache on an accelerator takes no keys and values with gradients.",
                why="the buffers that they are in are used again two layers later.",
                fix='Run the model under torch.no_grad(), or choose cache="dynamic".',
                argument="k",
            )
        cells = staging.arrived(self.slot, self.cells, current)
        one, two = self._pair(cells)
        one.narrow(self.axis, current.start, current.count).copy_(k)
        two.narrow(self.axis, current.start, current.count).copy_(v)
        end = current.end
        staging.store(cells[current.start :], self.cells[current.start : end])
        if self.following is not None:
            staging.fetch(self.following.slot, self.following.cells, current)
        return self.view(one, two)

    def seen(self, current: Pass) -> Any:
        """What `write` returned; what is not on the accelerator any more is copied there anew."""
        end = current.end
        if self.staging is not None:
            cells = self.staging.held(self.slot, self.cells.shape[1], current)
            if cells is not None:
                return self.view(*self._pair(cells))
        return self.read(0, end)

    def read(self, start: int, end: int) -> Any:
        """On an accelerator a copy."""
        if self.staging is None:
            return super().read(start, end)
        self.staging.streams.finish()
        return self.view(*self._pair(self.cells[start:end].to(self.staging.device)))

    # Operations

    def take_rows(self, index: Tensor, held: int) -> None:
        """Some cells at a time, so that memory need not hold them all."""
        self._finish()
        index, old = index.cpu(), (self.one, self.two)
        if index.shape[0] != self.one.shape[0]:
            first, second = ((index.shape[0], *shape[1:]) for shape in self.shapes)
            self.shapes, self.shelf = (first, second), self.shelf.another()
            numbers = sum(math.prod(shape) for shape in self.shapes)
            nothing = zeros((0, numbers), self.dtype, self.cells.device)
            room = self.cells.shape[0]  # stays: the cache has measured it
            self._adopt(self.shelf.resized(nothing, room, 0) if room else nothing)
        with torch.no_grad():
            for at in range(0, held, _AT_A_TIME):
                size = min(_AT_A_TIME, held - at)
                for new, kept in zip((self.one, self.two), old, strict=True):
                    rows = kept.narrow(self.axis, at, size).index_select(0, index)
                    new.narrow(self.axis, at, size).copy_(rows)

    def copy(self) -> OffloadedStore:
        self._finish()
        twin = type(self)(self.shapes, self.dtype, self.shelf.another(), hint=self.hint, slot=self.slot)
        twin.staging = self.staging  # the cache replaces it by its own
        if self.cells.shape[0]:
            twin._adopt(twin.shelf.resized(twin.cells, self.cells.shape[0], 0))
            with torch.no_grad():
                twin.cells.copy_(self.cells)
        return twin

    def detach(self) -> None:
        for tensor in (self.one, self.two):
            if tensor.requires_grad:
                tensor.detach_()

    def saved(self, held: int) -> dict[str, Tensor]:
        self._finish()
        return super().saved(held)

    def tensors(self) -> list[Tensor]:
        """One, and a file's bytes count like memory's."""
        return [self.cells]


class OffloadedKV(OffloadedStore, KVStore):
    """Keys and values."""


class OffloadedLatent(OffloadedStore, LatentStore):
    """Rotary key parts and latents."""
