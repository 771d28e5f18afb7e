"""One operation for what a compiled graph must not look into: append to the cache and attend.

The graph sees tensors of fixed shapes go in and one come out. How long the cache is, how it stores its cells and which
kernel attends is settled outside, anew in each pass, by the same objects that an eager pass calls. So every layout and
every backend works, and a growing cache compiles nothing anew.

A pass says what it is about by `passing`; the operation finds it by thread, so passes of several threads do not meet.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from pluglm_blocks.pass_state import PassState

    from pluglm.contracts import AttentionBackend, AttentionSpec

_current = threading.local()
_library = torch.library.Library("pluglm_executor_compile", "DEF")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "attend(Tensor q, Tensor? k, Tensor? v, Tensor? sinks, int slot, int mask, int site, int v_head_dim) -> Tensor"
)


@dataclass(frozen=True, slots=True)
class Site:
    """One attention part. shared: another part reads the slot that this one writes."""

    backend: AttentionBackend
    spec: AttentionSpec
    shared: bool


@dataclass(frozen=True, slots=True)
class Pass:
    """The pass under way. tokens: T, without the padding of the graph."""

    state: PassState
    tokens: int
    sites: tuple[Site, ...]


@contextmanager
def passing(current: Pass) -> Iterator[None]:
    """Within it, this thread's operations belong to `current`."""
    before = getattr(_current, "value", None)
    _current.value = current
    try:
        yield
    finally:
        _current.value = before


def _attend(
    q: Tensor, k: Tensor | None, v: Tensor | None, sinks: Tensor | None, slot: int, mask: int, site: int,
    v_head_dim: int,
) -> Tensor:  # fmt: skip
    """[B, H, T', D] -> [B, T', H, Dv]; of the T' tokens the first T are real, and no others reach cache or attention.

    k, v: [B, K, T', D] to append; None: the part reads what another one of this pass has appended.
    """
    current: Pass = _current.value
    state, T, place = current.state, current.tokens, current.sites[site]
    padded = q.shape[2]
    if k is None or v is None:
        view = state.views[slot]
        assert view is not None  # an earlier layer wrote it: checked when the model was built
    else:
        view = state.cache.append(slot, k[:, :, :T], v[:, :, :T], state.step)
        if place.shared:
            state.views[slot] = view
    o = place.backend.attend(q[:, :, :T], view, place.spec, state.masks[mask], sinks=sinks).transpose(1, 2)
    if padded == T:
        return o.contiguous()  # what `_shape` has promised; sdpa gives it as it is
    out = o.new_zeros(o.shape[0], padded, o.shape[2], v_head_dim)
    out[:, :T] = o
    return out


def _shape(
    q: Tensor, k: Tensor | None, v: Tensor | None, sinks: Tensor | None, slot: int, mask: int, site: int,  # noqa: ARG001
    v_head_dim: int,
) -> Tensor:  # fmt: skip
    """What `_attend` returns, for whoever compiles."""
    B, H, T, _ = q.shape
    return q.new_empty(B, T, H, v_head_dim)


_library.impl("attend", _attend, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("pluglm_executor_compile::attend", _shape, lib=_library)


class Written:
    """Stands for a view while a pass is traced: keys and values on their way to the operation."""

    def __init__(self, slot: int, k: Tensor, v: Tensor) -> None:
        self.slot, self.k, self.v, self.appended = slot, k, v, False


class TracedCache:
    """Stands for the cache while a pass is traced."""

    def append(self, slot: int, k: Tensor, v: Tensor, step: Any) -> Written:
        """Keep them for `TracedBackend.attend`, which comes next."""
        return Written(slot, k, v)


class TracedBackend:
    """Stands for the backend while a pass is traced: its `attend` is the operation. site: which attention part."""

    def __init__(self, site: int) -> None:
        self.site = site

    def attend(
        self, q: Tensor, view: Written, spec: AttentionSpec, mask: int,
        *, sinks: Tensor | None = None, bias: None = None,
    ) -> Tensor:  # fmt: skip
        """mask: its index in the pass."""
        k, v = (None, None) if view.appended else (view.k, view.v)
        view.appended = True
        op = torch.ops.pluglm_executor_compile.attend.default
        o: Tensor = op(q, k, v, sinks, view.slot, mask, self.site, spec.v_head_dim)
        return o.transpose(1, 2)


class TracedState:
    """Stands for `PassState` while a pass is traced. masks: their indices; rotations, temperatures: tensors."""

    def __init__(
        self, masks: int, slots: int, rotations: list[tuple[Tensor, Tensor]], temperatures: list[Tensor]
    ) -> None:
        self.cache, self.step = TracedCache(), None
        self.masks = list(range(masks))
        self.views: list[Written | None] = [None] * slots
        self.rotations, self.temperatures = rotations, temperatures


class TracedTokens:
    """Stands for `ForwardInput` while a pass is traced: what `Decoder` embeds."""

    def __init__(self, token_ids: Tensor | None, embeds: Tensor | None) -> None:
        self.token_ids, self.embeds = token_ids, embeds
