"""T5's relative positions: distances fall into buckets, each with a learned bias for every head."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def relative_buckets(
    q_positions: Tensor, k_positions: Tensor, num_buckets: int, max_distance: int, bidirectional: bool
) -> Tensor:
    """The bucket of every distance: exact for near keys, logarithmic from half of the buckets to `max_distance`.

    Args:
        q_positions: [B or 1, T] int64. k_positions: [B or 1, S] int64; what padding gives is masked anyway.
        bidirectional: half of the buckets are for keys after the query; else these share bucket 0.
    Returns: [B or 1, T, S] int64, each below num_buckets.
    Source: Raffel et al. 2020, "T5", section 2.1; the formula is that of mesh-tensorflow's `_relative_position_bucket`.
    """
    back = q_positions[:, :, None] - k_positions[:, None, :]  # [B, T, S]; positive: the key is earlier
    first = torch.zeros_like(back)
    if bidirectional:
        num_buckets //= 2
        first = (back < 0) * num_buckets
        back = back.abs()
    back = back.clamp(min=0)
    exact = num_buckets // 2
    octaves = torch.log(back.float().clamp(min=1) / exact) / math.log(max_distance / exact)
    far = (exact + (octaves * (num_buckets - exact)).long()).clamp(max=num_buckets - 1)
    return first + torch.where(back < exact, back, far)
