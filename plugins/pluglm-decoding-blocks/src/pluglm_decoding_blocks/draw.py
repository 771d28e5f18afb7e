"""One token from scores and a uniform number: the inverse of the cumulative distribution, in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def draw(scores: Tensor, uniform: Tensor) -> Tensor:
    """Draw one token a row.

    The tokens lie along [0, 1) in the order of their ids, each as wide as its probability; the token under `uniform` is
    drawn. A row's result depends on nothing but its own scores and number.

    Args:
        scores: [R, V] float32; -inf: forbidden; every row has a finite best score.
        uniform: [R] float64 in [0, 1).
    Returns: [R] int64; never a token of probability 0.
    """
    p = scores.double().softmax(-1)
    edges = p.cumsum(-1)  # [R, V]
    total = edges[:, -1:]
    target = torch.minimum(uniform[:, None] * total, torch.nextafter(total, torch.zeros_like(total)))
    token = torch.searchsorted(edges, target, right=True).clamp_(max=scores.shape[-1] - 1)  # [R, 1]
    if scores.device.type == "cpu":
        return token.squeeze(1)
    # A parallel sum may be off by one rounding where p is 0; such an edge must not count.
    possible = p.gather(-1, token) > 0
    return torch.where(possible, token, p.argmax(-1, keepdim=True)).squeeze(1)
