"""Temperature, top-k, top-p and min-p with settings of each row's own; numbers and order as in transformers 5.

Rows without a setting are left as they are, exactly. So one implementation serves a strategy's uniform rows and an
engine's unrelated ones, and both choose the same tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pluglm.contracts import GenerationConfig


class Warpers:
    """What reshapes the distribution before a draw.

    Args:
        configs: one for all rows, or one a row. device: of the scores.
    """

    def __init__(self, configs: Sequence[GenerationConfig], device: torch.device) -> None:
        def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]  # [R or 1, 1]

        self._stages: list[Callable[[Tensor], Tensor]] = []
        temperature = [c.temperature or 1.0 for c in configs]
        top_k = [c.top_k or 0 for c in configs]
        top_p = [1.0 if c.top_p is None else c.top_p for c in configs]
        min_p = [c.min_p or 0.0 for c in configs]
        if any(t != 1.0 for t in temperature):
            divisor = column(temperature)
            self._stages.append(lambda scores: scores / divisor)
        if any(top_k):
            largest, counts = max(top_k), column(top_k, torch.int64)
            self._stages.append(lambda scores: keep_best(scores, counts, largest))
        if any(p < 1.0 for p in top_p):
            tail, off = column([1 - p for p in top_p]), column([p >= 1.0 for p in top_p], torch.bool)
            self._stages.append(lambda scores: keep_mass(scores, tail, off))
        if any(min_p):
            share = column(min_p)
            self._stages.append(lambda scores: keep_likely(scores, share))

    def __call__(self, scores: Tensor) -> Tensor:
        """[R, V] float32 scores, -inf where a token is out of question."""
        for stage in self._stages:
            scores = stage(scores)
        return scores


def keep_best(scores: Tensor, counts: Tensor, largest: int) -> Tensor:
    """Top-k: forbid what is below the k-th best score; ties with it stay.

    Args:
        scores: [R, V]. counts: [R or 1, 1] int64, 0: off. largest: the largest count, known on the host.
    """
    best = scores.topk(min(largest, scores.shape[-1]), dim=-1).values  # [R, k]
    index = (counts.clamp(max=best.shape[-1]) - 1).clamp_(min=0).expand(scores.shape[0], 1)
    return scores.masked_fill((scores < best.gather(1, index)) & (counts > 0), -torch.inf)


def keep_mass(scores: Tensor, tail: Tensor, off: Tensor) -> Tensor:
    """Top-p: forbid the least likely tokens whose mass together is at most 1 - p; the best one always stays.

    Source: Holtzman et al. 2020, "The curious case of neural text degeneration", section 3.1.

    Args:
        scores: [R, V]. tail: [R or 1, 1] float32, 1 - p. off: [R or 1, 1] bool, rows that are left alone.
    """
    ordered, index = scores.sort(dim=-1)
    forbidden = ordered.softmax(-1).cumsum(-1) <= tail
    forbidden[:, -1] = False
    forbidden &= ~off
    return scores.masked_fill(forbidden.scatter(1, index, forbidden), -torch.inf)


def keep_likely(scores: Tensor, share: Tensor) -> Tensor:
    """Min-p: forbid tokens less likely than `share` times the best one (Nguyen et al. 2024, "Min-p", section 3).

    Args:
        scores: [R, V]. share: [R or 1, 1] float32, 0: off.
    """
    p = scores.softmax(-1)
    best = p.amax(-1, keepdim=True)
    return scores.masked_fill(p < share * best, -torch.inf)
