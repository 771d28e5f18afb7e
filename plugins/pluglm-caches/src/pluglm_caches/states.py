"""Slots of fixed size: the state of a recurrent layer, and the encoder's keys and values.

Both can change in a pass that then fails. A state is updated in a second copy that commit swaps in; what a pass wrote
to a cross slot is forgotten when the pass is discarded.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pluglm.contracts import CrossSlot, DenseView, KeyInfo, StateSlot
from pluglm.contracts.dtypes import torch_dtype
from pluglm.errors import CacheError
from pluglm_caches.stores import Store, resized, taken, wrong_shape, zeros


def clone(tensor: Tensor) -> Tensor:
    """An independent copy that the cache keeps."""
    return resized(tensor, 0, tensor.shape[0], tensor.shape[0])


class StateStore(Store):
    """The state tensors [B, …] of one recurrent layer, zero at the start."""

    kind = "state"

    def __init__(self, states: dict[str, Tensor]) -> None:
        self.states = states
        self._spare: dict[str, Tensor] | None = None
        self._open = False

    @classmethod
    def empty(cls, slot: StateSlot, rows: int, dtype: torch.dtype, device: torch.device) -> StateStore:
        """Zeros, in the dtypes that the slot names."""
        shapes = {name: (shape, torch_dtype(own) if own else dtype) for name, shape, own in slot.states}
        return cls({name: zeros((rows, *shape), kind, device) for name, (shape, kind) in shapes.items()})

    def opened(self) -> dict[str, Tensor]:
        """The state to be updated in place by the pass under way."""
        if self._spare is None:
            self._spare = {name: clone(tensor) for name, tensor in self.states.items()}
            self._open = True
        if not self._open:
            for name, tensor in self._spare.items():
                tensor.detach_().copy_(self.states[name])
            self._open = True
        return self._spare

    def commit(self) -> None:
        if self._open and self._spare is not None:
            self.states, self._spare, self._open = self._spare, self.states, False

    def discard(self) -> None:
        self._open = False

    def tensors(self) -> list[Tensor]:
        return [*self.states.values(), *(self._spare or {}).values()]

    def take_rows(self, index: Tensor, held: int) -> None:
        self.states = {name: taken(t, index) for name, t in self.states.items()}
        if self._spare and next(iter(self._spare.values())).shape[0] != index.shape[0]:
            self._spare = None

    def copy(self) -> StateStore:
        return StateStore({name: clone(tensor) for name, tensor in self.states.items()})

    def forget(self) -> None:
        with torch.no_grad():
            for tensor in self.states.values():
                tensor.zero_()

    def saved(self, held: int) -> dict[str, Tensor]:
        return dict(self.states)

    def misfit(self, tensors: Mapping[str, Tensor], rows: int, held: int) -> str:
        if set(tensors) != set(self.states):
            return f"it has {sorted(tensors)} and needs {sorted(self.states)}"
        for name, kept in self.states.items():
            if tensors[name].shape != (rows, *kept.shape[1:]) or tensors[name].dtype is not kept.dtype:
                return f"{name} is {list(tensors[name].shape)} {tensors[name].dtype}"
        return ""

    def restore(self, tensors: Mapping[str, Tensor], held: int) -> None:
        for name, kept in self.states.items():
            kept.copy_(tensors[name])


class CrossStore(Store):
    """Keys [B, K, S, D] and values [B, K, S, Dv] of an encoder's output, and its positions [B, S]."""

    kind = "cross"
    names = ("k", "v", "positions")

    def __init__(self, slot: CrossSlot, dtype: torch.dtype, device: torch.device) -> None:
        self._slot, self._dtype, self._device = slot, dtype, device
        self._kept: tuple[Tensor, Tensor, Tensor] | None = None
        self._fresh = False

    def set(self, k: Tensor, v: Tensor, positions: Tensor, *, rows: int, in_pass: bool) -> None:
        """Keep copies of these tensors, once."""
        if self._kept is not None:
            raise CacheError(
                "The cross slot has been written already.",
                why="the encoder's keys and values are written once and then only read.",
                fix="Call `reset()` before another input of the encoder, or make a new cache.",
                operation="set_cross",
            )
        length = positions.shape[-1]
        head = (rows, self._slot.num_kv_heads, length)
        for name, given, wanted, dtype in (
            ("k", k, (*head, self._slot.head_dim), self._dtype),
            ("v", v, (*head, self._slot.v_head_dim), self._dtype),
            ("positions", positions, (rows, length), torch.int64),
        ):
            if given.shape != wanted or given.dtype is not dtype:
                raise wrong_shape(name, given, wanted, dtype)
        kept = tuple(zeros(t.shape, t.dtype, self._device).copy_(t) for t in (k, v, positions))
        self._kept, self._fresh = (kept[0], kept[1], kept[2]), in_pass

    def get(self) -> tuple[Any, KeyInfo] | None:
        """The view and what its keys are; None before `set`."""
        if self._kept is None:
            return None
        k, v, positions = self._kept
        return DenseView(k, v), KeyInfo(positions, positions.shape[1], dense=False)

    def commit(self) -> None:
        self._fresh = False

    def discard(self) -> None:
        if self._fresh:
            self.forget()

    def tensors(self) -> list[Tensor]:
        return list(self._kept or ())

    def take_rows(self, index: Tensor, held: int) -> None:
        if self._kept is not None:
            k, v, positions = (taken(tensor, index) for tensor in self._kept)
            self._kept = (k, v, positions)

    def copy(self) -> CrossStore:
        twin = CrossStore(self._slot, self._dtype, self._device)
        if self._kept is not None and not self._fresh:
            twin.restore(self.saved(0), 0)
        return twin

    def forget(self) -> None:
        self._kept, self._fresh = None, False

    def saved(self, held: int) -> dict[str, Tensor]:
        return {} if self._fresh else dict(zip(self.names, self.tensors(), strict=False))

    def misfit(self, tensors: Mapping[str, Tensor], rows: int, held: int) -> str:
        if not tensors:
            return ""
        if set(tensors) != set(self.names):
            return f"it has {sorted(tensors)} and needs {sorted(self.names)}"
        head = (rows, self._slot.num_kv_heads, tensors["positions"].shape[-1])
        fits = (
            tensors["k"].shape == (*head, self._slot.head_dim)
            and tensors["v"].shape == (*head, self._slot.v_head_dim)
            and tensors["positions"].shape == (rows, head[2])
            and tensors["k"].dtype is tensors["v"].dtype is self._dtype
            and tensors["positions"].dtype is torch.int64
        )
        return "" if fits else f"its shapes are { ({name: list(t.shape) for name, t in sorted(tensors.items())}) }"

    def restore(self, tensors: Mapping[str, Tensor], held: int) -> None:
        self.forget()
        if tensors:
            kept = [zeros(t.shape, t.dtype, self._device).copy_(t) for t in map(tensors.__getitem__, self.names)]
            self._kept = (kept[0], kept[1], kept[2])
