"""What reshapes the distribution before a draw, with settings of each row's own; order and numbers of transformers 5.

Rows without a setting are left as they are, exactly. So one implementation serves a strategy's uniform rows and an
engine's unrelated ones, and both choose the same tokens. Filters that go by the entropy stand in `entropy.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from pluglm.contracts import GenerationConfig
from pluglm_decoding_blocks import entropy
from pluglm_decoding_blocks.values import number

Stage = Callable[[Tensor], Tensor]


class Warpers:
    """Temperature, top-h, top-k, top-p, min-p, typical-p, epsilon and eta cutoffs; each is off where it is not set.

    Args:
        configs: one for all rows, or one a row. device: of the scores.
        keep: tokens of each row that no filter takes away, the best ones; top-h knows no such minimum.

    Attributes:
        stages: (name in `pluglm.contracts.STAGES`, scores [R, V] -> scores), those that do something, in order.
    Raises: InputError for a value that makes no sense.
    """

    def __init__(self, configs: Sequence[GenerationConfig], device: torch.device, *, keep: int = 1) -> None:
        def column(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)[:, None]  # [R or 1, 1]

        def off(values: Sequence[float | None]) -> Tensor:
            return column([value is None for value in values], torch.bool)

        self.stages: list[tuple[str, Stage]] = []
        temperature = [c.temperature or 1.0 for c in configs]
        if any(t != 1.0 for t in temperature):
            divisor = column(temperature)
            self.stages.append(("temperature", lambda scores: scores / divisor))
        top_h = [number(c, "top_h", above=0, most=1) for c in configs]
        if any(h is not None for h in top_h):
            share = column([1.0 if h is None else h for h in top_h])
            self.stages.append(("top_h", partial(entropy.top_h, share=share, off=off(top_h))))
        # More than any vocabulary has is all of it, however much more.
        top_k = [min(max(c.top_k, keep), 2**31) if c.top_k else 0 for c in configs]
        if any(top_k):
            self.stages.append(("top_k", partial(keep_best, counts=column(top_k, torch.int64), largest=max(top_k))))
        top_p = [None if c.top_p == 1 else c.top_p for c in configs]
        if any(p is not None for p in top_p):
            tail = column([0.0 if p is None else 1 - p for p in top_p])
            self.stages.append(("top_p", partial(keep_mass, tail=tail, off=off(top_p), keep=keep)))
        min_p = [c.min_p or 0.0 for c in configs]
        if any(min_p):
            self.stages.append(("min_p", partial(keep_likely, share=column(min_p), keep=keep)))
        typical = [None if p == 1 else p for p in (number(c, "typical_p", above=0, most=1) for c in configs)]
        if any(p is not None for p in typical):
            mass = column([1.0 if p is None else p for p in typical])
            self.stages.append(("typical", partial(entropy.typical, mass=mass, off=off(typical), keep=keep)))
        for name, stage in (("epsilon", entropy.epsilon), ("eta", entropy.eta)):
            cutoff = [number(c, f"{name}_cutoff", least=0, below=1) or 0.0 for c in configs]
            if any(cutoff):
                self.stages.append((name, partial(stage, cutoff=column(cutoff), keep=keep)))

    def __call__(self, scores: Tensor) -> Tensor:
        """[R, V] float32 scores, -inf where a token is out of question."""
        for _, stage in self.stages:
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


def keep_mass(scores: Tensor, tail: Tensor, off: Tensor, keep: int = 1) -> Tensor:
    """Top-p: forbid the least likely tokens whose mass together is at most 1 - p; the `keep` best always stay.

    Source: Holtzman et al. 2020, "The curious case of neural text degeneration", section 3.1.

    Args:
        scores: [R, V]. tail: [R or 1, 1] float32, 1 - p. off: [R or 1, 1] bool, rows that are left alone.
    """
    ordered, index = scores.sort(dim=-1)
    forbidden = ordered.softmax(-1).cumsum(-1) <= tail
    forbidden[:, -keep:] = False
    forbidden &= ~off
    return scores.masked_fill(forbidden.scatter(1, index, forbidden), -torch.inf)


def keep_likely(scores: Tensor, share: Tensor, keep: int = 1) -> Tensor:
    """Min-p: forbid tokens less likely than `share` times the best one (Nguyen et al. 2024, "Min-p", section 3).

    Args:
        scores: [R, V]. share: [R or 1, 1] float32, 0: off. keep: the best tokens, which stay.
    """
    p = scores.softmax(-1)
    forbidden = p < share * p.amax(-1, keepdim=True)
    if keep > 1:  # the best one stays by itself
        forbidden.scatter_(1, p.topk(min(keep, p.shape[-1]), dim=-1).indices, False)
    return scores.masked_fill(forbidden, -torch.inf)
