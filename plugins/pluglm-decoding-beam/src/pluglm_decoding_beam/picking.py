"""How candidates are picked among all continuations of a search's beams: the best, or drawn ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from pluglm_decoding_blocks.draw import draw
from pluglm_decoding_blocks.rng import Uniforms
from pluglm_decoding_blocks.warpers import Warpers
from torch import Tensor

from pluglm.contracts import GenerationConfig

#: (totals [B, W * V] float32, new tokens so far, K) -> totals and places [B, K] of the picked, in the order of picking.
Pick = Callable[[Tensor, int, int], tuple[Tensor, Tensor]]


def best(totals: Tensor, _: int, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best."""
    values, places = totals.topk(count, dim=-1)
    return values, places


class Drawn:
    """`count` different ones, one after the other, each with its probability among those that are left.

    That is sampling without replacement from the softmax of the totals, as transformers' beam sampling does it with
    torch.multinomial; here the numbers depend on a prompt's seed and the position alone. Draw k at new token i has
    position i * count + k. Places whose total is -inf come last, with -inf, once nothing else is left.

    Args:
        seeds: [B] int64, one a prompt, on the model's device.
    """

    def __init__(self, seeds: Tensor) -> None:
        self._numbers = Uniforms(seeds)

    def __call__(self, totals: Tensor, step: int, count: int) -> tuple[Tensor, Tensor]:
        """See `Pick`."""
        left = totals.clone()
        values, places = [], []
        for k in range(count):
            nothing = (left == -torch.inf).all(-1, keepdim=True)
            place = draw(torch.where(nothing, 0.0, left), self._numbers.at(step * count + k))[:, None]  # [B, 1]
            places.append(place)
            values.append(left.gather(1, place))
            left.scatter_(1, place, -torch.inf)
        return torch.cat(values, dim=1), torch.cat(places, dim=1)


class BeamWarpers:
    """Temperature, top-k, top-p and min-p on each beam's scores; the `keep` best tokens always stay.

    As in transformers 5.23, where `min_tokens_to_keep` is one more than there are end tokens, so that a beam can go on.

    Args:
        keep: tokens of each beam that no filter takes away. device: of the scores.
    """

    def __init__(self, config: GenerationConfig, keep: int, device: torch.device) -> None:
        self._temperature, self._keep = config.temperature or 1.0, keep
        top_k = max(config.top_k, keep) if config.top_k else None
        self._filter = Warpers([replace(config, temperature=None, top_k=top_k)], device)

    def __call__(self, scores: Tensor) -> Tensor:
        """[R, V] float32 scores, -inf where a token is out of question."""
        scores = scores / self._temperature
        kept = scores.topk(min(self._keep, scores.shape[-1]), dim=-1)
        return self._filter(scores).scatter(1, kept.indices, kept.values)
