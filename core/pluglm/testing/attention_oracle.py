"""What attention is, in loops and float64, and small cases to compare a backend with. Shares no code with any backend.

Where the words of `AttentionSpec` leave an order open, it is: scale, soft cap, ALiBi and bias, mask, softmax. A query
that is padding itself is not compared; it must only be finite.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pluglm.contracts import (
    AttentionBackend,
    AttentionSpec,
    DenseView,
    KeyInfo,
    LatentView,
    MaskSpec,
    PagedView,
    QuantizedView,
)  # fmt: skip

#: Every word an attention provider may list, and the spec that needs it. "padding" and "segments" come with the keys.
FEATURES: dict[str, dict[str, Any]] = {
    "grouped-heads": {"num_kv_heads": 3},
    "value-head-dim": {"v_head_dim": 4},
    "bidirectional": {"mask": MaskSpec(causal=False)},
    "window": {"mask": MaskSpec(window=3)},
    "chunk": {"mask": MaskSpec(chunk=4)},
    "prefix": {"mask": MaskSpec(prefix=True)},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "alibi": {"alibi_slopes": tuple(2.0**-i for i in range(6))},
    "bias": {"bias": True},
    "padding": {},
    "segments": {},
}
PLAIN = AttentionSpec(num_heads=6, num_kv_heads=6, head_dim=8, v_head_dim=8, scale=0.4)


@dataclass(frozen=True)
class Layout:
    """Positions of the queries and of the keys, one list a row; `dense` as in `KeyInfo`."""

    q: tuple[tuple[int, ...], ...]
    k: tuple[tuple[int, ...], ...]
    dense: bool = False


LAYOUTS: dict[str, Layout] = {
    "a first prompt": Layout(((0, 1, 2, 3, 4),), ((0, 1, 2, 3, 4),), dense=True),
    "more tokens": Layout(((2, 3, 4, 5, 6),), ((0, 1, 2, 3, 4, 5, 6),), dense=True),
    "one token": Layout(((6,),), ((0, 1, 2, 3, 4, 5, 6),), dense=True),
    "one token after many": Layout(((89,),), (tuple(range(90)),), dense=True),
    "many tokens": Layout((tuple(range(62, 79)),), (tuple(range(79)),), dense=True),
    "padding on the left": Layout(((0, 1, 2, 3, 4), (2, 3, 4, 5, 6)), ((-1, -1, 0, 1, 2, 3, 4), (0, 1, 2, 3, 4, 5, 6))),
    "padding on the right": Layout(
        ((2, 3, 4, -1, -1), (2, 3, 4, 5, 6)), ((0, 1, 2, 3, 4, -1, -1), (0, 1, 2, 3, 4, 5, 6))
    ),
    "holes": Layout(((1, 2, -1, 3, 4), (2, -1, 3, 4, 5)), ((0, -1, 1, 2, -1, 3, 4), (0, 1, 2, -1, 3, 4, 5))),
    "a ring": Layout(((4, 5, 6, 7, 8), (3, 4, 5, 6, 7)), ((7, 8, 2, 3, 4, 5, 6), (5, 6, 7, 1, 2, 3, 4))),
    "one token in a ring": Layout(((8,), (7,)), ((7, 8, 2, 3, 4, 5, 6), (5, 6, 7, 1, 2, 3, 4))),
    "one token after padding": Layout(((3,), (6,)), ((-1, -1, -1, 0, 1, 2, 3), (0, 1, 2, 3, 4, 5, 6))),
    "nothing to see": Layout(((0, 1, 2, 3, 4), (2, 3, 4, 5, 6)), ((-1,) * 7, (0, 1, 2, 3, 4, 5, 6))),
    "one token sees nothing": Layout(((3,), (6,)), ((-1,) * 7, (0, 1, 2, 3, 4, 5, 6))),
}


@dataclass(frozen=True)
class Case:
    """One call of a backend. q: [B, H, T, D]; k: [B, K, S, D]; v: [B, K, S, Dv]; sinks: [H]; bias: [1, H, T, S]."""

    spec: AttentionSpec
    q_positions: Tensor
    keys: KeyInfo
    q: Tensor
    k: Tensor
    v: Tensor
    sinks: Tensor | None
    bias: Tensor | None

    def run(self, backend: AttentionBackend, view: Any = None) -> Tensor:
        """`prepare` and `attend`, as a model calls them."""
        return self.attend(backend, self.prepare(backend), view)

    def prepare(self, backend: AttentionBackend) -> Any:
        """The backend's mask for this case."""
        return backend.prepare(self.spec, self.q_positions, self.keys)

    def attend(self, backend: AttentionBackend, mask: Any, view: Any = None) -> Tensor:
        """The backend's output with a mask that it prepared."""
        view = view or DenseView(self.k, self.v)
        return backend.attend(self.q, view, self.spec, mask, sinks=self.sinks, bias=self.bias)


def case_of(
    layout: Layout, spec: AttentionSpec, *, dtype: torch.dtype = torch.float32, device: str = "cpu",
    segments: bool = False, batch_size: int = 2, seed: int = 0,
) -> Case:  # fmt: skip
    """Random tensors for a layout: queries as a projection leaves them, keys and values in larger buffers.

    Cells that nobody may see (position < 0) hold values far larger than the others, so that a leak shows.
    """
    random = torch.Generator().manual_seed(seed)
    q_positions, k_positions = torch.tensor(layout.q), torch.tensor(layout.k)
    B, (T, S) = batch_size, (q_positions.shape[1], k_positions.shape[1])
    H, K, D, Dv = spec.num_heads, spec.num_kv_heads, spec.head_dim, spec.v_head_dim

    def tensor(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    hidden = (k_positions < 0)[:, None, :, None]
    q = tensor(B, T, H, D).transpose(1, 2)
    k, v = (tensor(B, K, S + 3, size) for size in (D, Dv))
    for buffer in (k, v):
        buffer[:, :, :S] = buffer[:, :, :S].masked_fill(hidden, 50.0)
        buffer[:, :, S:] = 50.0
    prefix = torch.tensor([4, 2, 3])[:B] if spec.mask.prefix else None
    cells = torch.stack([torch.arange(S) * 2 // S, torch.arange(S) * 3 // S, torch.zeros(S, dtype=torch.long)])[:B]

    def given(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.to(device=device, dtype=dtype if x.is_floating_point() else None)

    keys = KeyInfo(
        positions=k_positions.to(device), length=S, dense=layout.dense, prefix_lengths=given(prefix),
        segments=cells.to(device) if segments else None, q_segments=cells[:, S - T :].to(device) if segments else None,
    )  # fmt: skip
    place: dict[str, Any] = {"device": device, "dtype": dtype}
    return Case(
        spec, q_positions.to(device), keys, q.to(**place), k.to(**place)[:, :, :S], v.to(**place)[:, :, :S],
        given(tensor(H)) if spec.sinks else None,
        given(tensor(1 if layout.dense else B, H, T, S)) if spec.bias else None,
    )  # fmt: skip


def sees(spec: AttentionSpec, q: int, k: int, *, prefix: int = 0, same_segment: bool = True) -> bool:
    """Whether a query at position `q` sees a key at position `k`. Integers and `if`, to be read."""
    if k < 0 or q < 0 or not same_segment:
        return False
    in_prefix = spec.mask.prefix and q < prefix and k < prefix
    if spec.mask.causal and k > q and not in_prefix:
        return False
    if spec.mask.window is not None and q - k >= spec.mask.window:
        return False
    return spec.mask.chunk is None or q // spec.mask.chunk == k // spec.mask.chunk


def expected(case: Case) -> Tensor:
    """[B, H, T, Dv] float64 on the CPU: what the backend should give, up to rounding."""
    spec, keys = case.spec, case.keys
    q, k, v = (x.detach().cpu().double() for x in (case.q, case.k, case.v))
    B, H, T, _ = q.shape
    o = torch.zeros(B, H, T, v.shape[3], dtype=torch.float64)
    q_positions, k_positions = (_rows(x, B) for x in (case.q_positions, keys.positions))
    q_segments, segments = (_rows(x, B) if x is not None else None for x in (keys.q_segments, keys.segments))
    groups = [h * spec.num_kv_heads // H for h in range(H)]
    slopes = None if spec.alibi_slopes is None else torch.tensor(spec.alibi_slopes, dtype=torch.float64)[:, None]
    prefixes = [0] * B if keys.prefix_lengths is None else keys.prefix_lengths.tolist()
    for b in range(B):
        for t in range(T):
            seen = [
                j
                for j, k_position in enumerate(k_positions[b])
                if sees(
                    spec, q_positions[b][t], k_position, prefix=prefixes[b],
                    same_segment=not segments or not q_segments or segments[b][j] == q_segments[b][t],
                )
            ]  # fmt: skip
            if not seen:
                continue
            s = torch.einsum("hd,hsd->hs", q[b, :, t], k[b, groups][:, seen]) * spec.scale
            if spec.softcap is not None:
                s = spec.softcap * torch.tanh(s / spec.softcap)
            if slopes is not None:
                s = s - slopes * torch.tensor([q_positions[b][t] - k_positions[b][j] for j in seen])
            if case.bias is not None:
                s = s + case.bias[b if len(case.bias) > 1 else 0, :, t].cpu().double()[:, seen]
            weights = s.exp()  # [H, keys that are seen]
            total = weights.sum(dim=1, keepdim=True)
            if case.sinks is not None:
                total = total + case.sinks.cpu().double()[:, None].exp()
            o[b, :, t] = torch.einsum("hs,hsd->hd", weights / total, v[b, groups][:, seen])
    return o


def spec_of(features: Sequence[str]) -> AttentionSpec:
    """The plain spec, changed by every named feature; masks are combined."""
    spec = PLAIN
    for name in features:
        changes = dict(FEATURES[name])
        if "mask" in changes:
            mask, plain = changes["mask"], MaskSpec()
            differing = {f: getattr(mask, f) for f in vars(mask) if getattr(mask, f) != getattr(plain, f)}
            changes["mask"] = replace(spec.mask, **differing)
        spec = replace(spec, **changes)
    return spec


def stored(case: Case, view: str) -> Any:
    """The keys and values of a case as another kind of `KVView`."""
    k, v = case.k, case.v
    if view == "paged":
        pages = [_pages(x) for x in (k, v)]
        B, N = k.shape[0], pages[0].shape[0] // k.shape[0]
        table = torch.arange(B * N, device=k.device, dtype=torch.int32).flip(0).view(B, N)
        k_pages, v_pages = (x.flip(0) for x in pages)  # later tokens in earlier pages
        lengths = torch.full((B,), k.shape[2], dtype=torch.int32, device=k.device)
        return PagedView(k_pages, v_pages, table, lengths, k.shape[2])
    if view == "quantized":
        blocks, residual = (k[:, :, :4], v[:, :, :4]), DenseView(k[:, :, 4:], v[:, :, 4:])
        return QuantizedView(blocks, residual, lambda packed: packed)
    if view == "latent":
        return LatentView(latent=v[:, 0], rope=k[:, 0, :, v.shape[-1] :])
    assert view == "dense", f"this kit has no view of the kind {view!r}"
    return DenseView(k, v)


def _pages(x: Tensor, size: int = 4) -> Tensor:
    """[B, K, S, D] -> [B·N, size, K, D]; what is left of a row's last page is far too large to go unnoticed."""
    rows = torch.nn.functional.pad(x.transpose(1, 2), (0, 0, 0, 0, 0, -x.shape[2] % size), value=50.0)
    return rows.reshape(-1, size, *rows.shape[2:])


def _rows(x: Tensor, batch_size: int) -> list[list[int]]:
    rows: list[list[int]] = x.expand(batch_size, -1).tolist()
    return rows
