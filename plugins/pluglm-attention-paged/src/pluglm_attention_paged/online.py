"""Attention block by block in torch: any device, dtype and number of queries, with gradients. The readable version.

Scores are never all there at once; the softmax keeps its largest score, its sum and the weighted values so far. Pages
are gathered a block at a time, so the history is never copied as a whole.

Source: Milakov & Gimelshein 2018, "Online normalizer calculation for softmax", algorithm 3; Dao et al. 2022,
"FlashAttention", section 3.1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import torch

from pluglm.contracts import DenseView, PagedView

if TYPE_CHECKING:
    from torch import Tensor

    from pluglm.contracts import AttentionSpec

#: Cells that are gathered and scored at a time.
BLOCK = 512


class Extras(NamedTuple):
    """What a layer adds to its scores.

    sinks: [H]. bias: [1 or B, H, T, S]. slopes: [H] of ALiBi, with q_positions [1 or B, T] and k_positions [1 or B, S].
    """

    sinks: Tensor | None = None
    bias: Tensor | None = None
    slopes: Tensor | None = None
    q_positions: Tensor | None = None
    k_positions: Tensor | None = None


def blocks(view: PagedView | DenseView, start: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """The keys from about `start` on in pieces: the first cell, k [B, K, n, D] and v [B, K, n, Dv]."""
    if isinstance(view, DenseView):
        for first in range(start, view.k.shape[2], BLOCK):
            yield first, view.k[:, :, first : first + BLOCK], view.v[:, :, first : first + BLOCK]
        return
    size = view.k_pages.shape[1]
    together = max(1, BLOCK // size)
    for page in range(start // size, -(-view.length // size), together):
        first = page * size
        count = min(view.length - first, together * size)
        table = view.block_table[:, page : page + together].long()  # [B, N]
        k, v = (pages[table].flatten(1, 2)[:, :count].transpose(1, 2) for pages in (view.k_pages, view.v_pages))
        yield first, k, v


def attend(
    q: Tensor, view: PagedView | DenseView, spec: AttentionSpec, start: int, visible: Tensor | None, extras: Extras,
    *, compute: torch.dtype,
) -> Tensor:  # fmt: skip
    """softmax(softcap(scale · q kᵀ) + alibi + bias, sinks) v over the visible keys.

    Args:
        q: [B, H, T, D]. visible: [1 or B, T, S] bool; None: every key from `start` on.
        compute: dtype of scores and sums.
    Returns: [B, H, T, Dv] in q's dtype; zeros for a query that sees nothing.
    """
    B, H, T, D = q.shape
    K, G = spec.num_kv_heads, H // spec.num_kv_heads
    rows = q.to(compute).reshape(B, K, G * T, D) * spec.scale
    top = torch.full((B, K, G, T, 1), float("-inf"), dtype=compute, device=q.device)
    total = torch.zeros_like(top)
    o = torch.zeros((B, K, G, T, spec.v_head_dim), dtype=compute, device=q.device)
    for first, k, v in blocks(view, start):
        n = k.shape[2]
        s = (rows @ k.to(compute).transpose(2, 3)).view(B, K, G, T, n)
        s = _adjusted(s, spec, extras, first)
        if visible is not None:
            s = s.masked_fill(~visible[:, None, None, :, first : first + n], float("-inf"))
        elif first < start:  # the page in which the first visible key lies begins before it
            s[..., : start - first] = float("-inf")
        largest = torch.maximum(top, s.amax(dim=-1, keepdim=True))
        base = largest.masked_fill(largest == float("-inf"), 0.0)  # nothing seen so far: every weight is exp(-inf)
        p, less = torch.exp(s - base), torch.exp(top - base)
        total = total * less + p.sum(dim=-1, keepdim=True)
        o = o * less + (p.view(B, K, G * T, n) @ v.to(compute)).view(B, K, G, T, -1)
        top = largest
    if extras.sinks is not None:
        sink = extras.sinks.to(compute).view(1, K, G, 1, 1)
        largest = torch.maximum(top, sink)
        less = torch.exp(top - largest)
        total, o = total * less + torch.exp(sink - largest), o * less
    o = o / total.masked_fill(total == 0, 1.0)
    return o.view(B, H, T, spec.v_head_dim).to(q.dtype)


def _adjusted(s: Tensor, spec: AttentionSpec, extras: Extras, first: int) -> Tensor:
    """Scores [B, K, G, T, n] of the keys from `first` on with soft cap, ALiBi and bias."""
    _, K, G, T, n = s.shape
    if spec.softcap is not None:
        s = spec.softcap * torch.tanh(s / spec.softcap)
    if extras.slopes is not None and extras.q_positions is not None and extras.k_positions is not None:
        distance = extras.q_positions[:, :, None] - extras.k_positions[:, None, first : first + n]  # [b, T, n]
        s = s - extras.slopes.view(1, K, G, 1, 1) * distance[:, None, None]
    if extras.bias is not None:
        s = s + extras.bias[..., first : first + n].to(s.dtype).view(-1, K, G, T, n)
    return s
