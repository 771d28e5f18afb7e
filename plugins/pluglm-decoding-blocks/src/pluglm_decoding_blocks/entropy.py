"""Filters that go by the entropy of a row's distribution: top-h, typical-p, eta; and epsilon, which eta refines.

Sources: transformers 5.23 TopHLogitsWarper, TypicalLogitsWarper, EpsilonLogitsWarper and EtaLogitsWarper, number by
number; the papers stand at each. All take and give scores [R, V] float32; settings are [R or 1, 1].
"""

from __future__ import annotations

import torch
from torch import Tensor

#: Tokens that top-h looks at, the best ones.
_LOOKED_AT = 100


def top_h(scores: Tensor, share: Tensor, off: Tensor) -> Tensor:
    """Keep the best tokens whose parts of the entropy add up to at most `share` of it; the best one stays.

    Source: Baghaei Potraghloo et al. 2025, "Top-H decoding", algorithm 1; the distribution is that of the 100 best.

    Args:
        share: from above 0 to 1. off: bool, rows that are left alone.
    """
    best, index = scores.topk(min(_LOOKED_AT, scores.shape[-1]), dim=-1)
    p, h = _distribution(best)
    kept = (-p * p.log()).cumsum(-1) <= h * share
    kept[:, 0] = True
    kept = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, index, kept)
    return scores.masked_fill(~(kept | off), -torch.inf)


def typical(scores: Tensor, mass: Tensor, off: Tensor, keep: int) -> Tensor:
    """Keep the tokens whose information is nearest to the expected one, until they have `mass` together.

    Source: Meister et al. 2023, "Locally typical sampling", section 4.

    Args:
        mass: from above 0 to below 1. off: bool, rows that are left alone. keep: the most typical, which stay.
    """
    logp = scores.log_softmax(-1)
    h = -(logp * logp.exp()).nansum(-1, keepdim=True)
    distance, index = (-logp - h).abs().sort(-1)
    inside = scores.gather(1, index).softmax(-1).cumsum(-1) < mass
    last = inside.sum(1, keepdim=True).clamp_(max=scores.shape[-1] - 1)
    forbidden = distance > distance.gather(1, last)
    forbidden[:, :keep] = False
    forbidden &= ~off
    return scores.masked_fill(forbidden.scatter(1, index, forbidden), -torch.inf)


def epsilon(scores: Tensor, cutoff: Tensor, keep: int) -> Tensor:
    """Forbid tokens of a probability below `cutoff`, 0: off. keep: the best, which stay.

    Source: Hewitt, Manning, Liang 2022, "Truncation sampling as language model desmoothing", section 4.1.
    """
    return _forbid_below(scores, scores.softmax(-1), cutoff, keep)


def eta(scores: Tensor, cutoff: Tensor, keep: int) -> Tensor:
    """As `epsilon`, below min(cutoff, sqrt(cutoff) · exp(-entropy)): less where many tokens are likely.

    Source: the same paper, section 4.2.
    """
    _, h = _distribution(scores)
    return _forbid_below(scores, scores.softmax(-1), torch.minimum(cutoff, cutoff.sqrt() * torch.exp(-h)), keep)


def _forbid_below(scores: Tensor, p: Tensor, least: Tensor, keep: int) -> Tensor:
    kept = scores.topk(min(keep, scores.shape[-1]), dim=-1).values[:, -1:]
    return scores.masked_fill((p < least) & (scores < kept), -torch.inf)


def _distribution(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities [R, V] and entropy [R, 1]; tokens that are forbidden add nothing to it."""
    logp = scores - scores.logsumexp(-1, keepdim=True)
    p = logp.softmax(-1)
    return p, -(logp.clamp(min=torch.finfo(logp.dtype).min) * p).sum(-1, keepdim=True)
