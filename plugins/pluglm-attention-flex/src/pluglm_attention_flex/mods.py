"""A layer's spec as the two functions that flex_attention takes: which keys are seen, and what a score becomes.

Both are given indices, one of each at a time: b of a row, h of a head, t of a query, j of a key. flex_attention turns
them into loops over whole blocks, compiled or not (Dong et al. 2024, "Flex Attention", section 3).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

    from pluglm.contracts import AttentionSpec, KeyInfo, MaskSpec

MaskMod = Callable[["Tensor", "Tensor", "Tensor", "Tensor"], "Tensor"]
ScoreMod = Callable[["Tensor", "Tensor", "Tensor", "Tensor", "Tensor"], "Tensor"]


def mask_mod(spec: MaskSpec, q_positions: Tensor, keys: KeyInfo) -> MaskMod:
    """Whether query t of row b sees key j: `MaskSpec.visible`, one pair at a time.

    Args:
        q_positions: [b, T] int64; keys.positions: [b, S] int64. b is the batch, or 1 where all rows are alike.
    """
    k_positions, prefixes = keys.positions, keys.prefix_lengths if spec.prefix else None
    segments = None if keys.segments is None or keys.q_segments is None else (keys.q_segments, keys.segments)

    def sees(b: Tensor, _h: Tensor, t: Tensor, j: Tensor) -> Tensor:
        q, k = at(q_positions, b, t), at(k_positions, b, j)
        seen = (q >= 0) & (k >= 0)
        if spec.causal:
            earlier = k <= q
            if prefixes is not None:
                length = torch.ops.aten.index(prefixes, [b])
                earlier = earlier | ((q < length) & (k < length))
            seen = seen & earlier
        if spec.window is not None:
            seen = seen & (q - k < spec.window)
        if spec.chunk is not None:
            seen = seen & (q // spec.chunk == k // spec.chunk)
        if segments is not None:
            seen = seen & (at(segments[0], b, t) == at(segments[1], b, j))
        return seen

    return sees


def score_mod(
    spec: AttentionSpec, q_positions: Tensor, k_positions: Tensor, slopes: Tensor | None, bias: Tensor | None
) -> ScoreMod | None:
    """What a scaled score becomes: soft cap, then ALiBi, then bias; None if it stays as it is.

    Args:
        slopes: [H] if the spec has ALiBi. bias: [b, H, T, S] if it has one.
    """
    if spec.softcap is None and slopes is None and bias is None:
        return None

    def becomes(s: Tensor, b: Tensor, h: Tensor, t: Tensor, j: Tensor) -> Tensor:
        if spec.softcap is not None:
            s = spec.softcap * torch.tanh(s / spec.softcap)
        if slopes is not None:
            s = s - torch.ops.aten.index(slopes, [h]) * (at(q_positions, b, t) - at(k_positions, b, j))
        if bias is not None:
            s = s + (bias[b, h, t, j] if bias.shape[0] > 1 else bias[0, h, t, j])
        return s

    return becomes


def at(table: Tensor, b: Tensor, i: Tensor) -> Tensor:
    """Entry i of row b; of the only row where all are alike.

    aten.index is what `table[b, i]` becomes inside flex_attention, without the detour for gradients, which positions
    do not have. Uncompiled, the detour takes most of the time.
    """
    index = torch.ops.aten.index
    entry: Tensor = index(table, [b, i]) if table.shape[0] > 1 else index(table[0], [i])
    return entry


def fold_mask(sees: MaskMod, T: int) -> MaskMod:
    """The same mask for queries [B, K, G·T, D], in which row r is query r % T of the group's head r // T."""
    return lambda b, h, r, j: sees(b, h, r % T, j)


def fold_score(becomes: ScoreMod, T: int, G: int) -> ScoreMod:
    """The same scores for queries [B, K, G·T, D]: row r of key head h is query r % T of head h · G + r // T."""
    return lambda s, b, h, r, j: becomes(s, b, h * G + r // T, r % T, j)
