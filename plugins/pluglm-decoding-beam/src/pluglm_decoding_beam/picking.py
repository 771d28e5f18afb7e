"""How candidates are picked among all continuations of a search's beams: the best, or drawn ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from pluglm_decoding_blocks.draw import draw
from pluglm_decoding_blocks.rng import Uniforms
from torch import Tensor

from pluglm.contracts import FinishReason
from pluglm_decoding_beam.hypotheses import Beam, Candidate

#: (totals [B, W, V] float32, new tokens so far, K) -> totals and places w * V + v [B, at least K] of the picked, in the
#: order of picking.
Pick = Callable[[Tensor, int, int], tuple[Tensor, Tensor]]
#: (candidates as picked, width) -> those that end and why, and at most `width` that go on.
Select = Callable[[Sequence[Candidate], int], tuple[list[tuple[Beam, FinishReason]], list[Beam]]]


def best(totals: Tensor, _: int, count: int) -> tuple[Tensor, Tensor]:
    """The `count` best."""
    values, places = totals.flatten(1).topk(count, dim=-1)
    return values, places


def first(candidates: Sequence[Candidate], width: int) -> tuple[list[tuple[Beam, FinishReason]], list[Beam]]:
    """Of those that end only the first `width` picked count: the others are there so that enough can go on."""
    ended = [(beam, reason) for beam, reason in candidates[:width] if reason is not None]
    going_on = [beam for beam, reason in candidates if reason is None]
    going_on.sort(key=lambda beam: -beam.score)  # drawn candidates come in the order of the draws
    return ended, going_on[:width]


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
        left = totals.flatten(1).clone()
        values, places = [], []
        for k in range(count):
            nothing = (left == -torch.inf).all(-1, keepdim=True)
            place = draw(torch.where(nothing, 0.0, left), self._numbers.at(step * count + k))[:, None]  # [B, 1]
            places.append(place)
            values.append(left.gather(1, place))
            left.scatter_(1, place, -torch.inf)
        return torch.cat(values, dim=1), torch.cat(places, dim=1)
