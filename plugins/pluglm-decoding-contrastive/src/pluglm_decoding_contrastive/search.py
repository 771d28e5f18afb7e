"""Contrastive search: a likely token whose hidden state is unlike those of the text so far."""

from __future__ import annotations

from typing import Any

import torch
from pluglm_decoding_blocks.loop import Choose
from pluglm_decoding_blocks.processors import Processors, known_best
from pluglm_decoding_blocks.prompt import Prompt
from pluglm_decoding_blocks.settings import Settings
from torch import Tensor

from pluglm.contracts import GenerationConfig
from pluglm.errors import InputError
from pluglm_decoding_contrastive.call import ContrastiveStrategy, Prepared, all_the_same
from pluglm_decoding_contrastive.candidate_feed import NEEDS, CandidateFeed

#: Where neither the call nor the model's files say: the paper's weight, and fewer candidates than its 5 to 10.
DEFAULT_ALPHA, DEFAULT_CANDIDATES = 0.6, 4


class ContrastiveSearch(ContrastiveStrategy):
    """Of the K = `top_k` most likely tokens the one with the largest (1 - alpha) p - alpha s.

    p is its probability after all processors, s the largest cosine between its last hidden state and those of all
    tokens before it in its row. Padding is no token. A seed changes nothing and is accepted.

    Source: Su et al. 2022, "A Contrastive Framework for Neural Text Generation", section 4.2.
    """

    name = "contrastive-search"
    fields = ContrastiveStrategy.fields | {"penalty_alpha", "top_k"}
    needs = NEEDS

    def _prepare(
        self, model: Any, prompt: Prompt, config: GenerationConfig, settings: Settings, model_kwargs: dict[str, Any]
    ) -> Prepared:
        if settings.copies > 1:
            raise all_the_same(self.name, settings.copies, 'Name decoding="sampling", or ask for one sequence.')
        alpha, count = _alpha(config), min(_candidates(config), self._request.vocab_size)
        room = prompt.width + max(settings.limits(prompt.lengths))
        feed = CandidateFeed(model, prompt, settings, count, room, model_kwargs)
        return Prepared(feed, prompt, lambda process: _chooser(feed, process, alpha, count), undo=feed.take_back)


def _chooser(feed: CandidateFeed, process: Processors, alpha: float, count: int) -> Choose:
    def choose(logits: Tensor, sequences: Tensor, _: int) -> tuple[Tensor, Tensor, Tensor]:
        scores, raw = process(sequences, logits)
        p, candidates = scores.float().softmax(-1).topk(count, dim=-1)  # [B, K]
        balance = (1 - alpha) * p - alpha * feed.attempt(sequences, candidates)
        # Where fewer than K tokens are allowed, others are candidates, too. Being unlike the text must not choose them.
        balance = torch.where(scores.gather(1, candidates) == -torch.inf, -torch.inf, balance)
        value, place = balance.max(-1)
        feed.take(place)
        tokens = candidates.gather(1, place[:, None])[:, 0]
        best = known_best(scores.amax(-1), raw).float()
        return tokens, torch.where(value.isnan(), value, best), scores  # NaN in a hidden state is an error, too

    return choose


def _alpha(config: GenerationConfig) -> float:
    alpha = config.extra.get("penalty_alpha", DEFAULT_ALPHA)
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha <= 1:
        raise InputError(
            f"penalty_alpha={alpha!r} makes no sense: it must be a number > 0, at most 1.",
            why="it is the weight of being unlike the text; 0 leaves the most likely token.",
            fix='Set such a number, or name decoding="greedy".', argument="penalty_alpha",
        )  # fmt: skip
    return float(alpha)


def _candidates(config: GenerationConfig) -> int:
    count = DEFAULT_CANDIDATES if config.top_k is None else config.top_k
    if count < 2:
        raise InputError(
            f"top_k={count} leaves nothing to choose from.", why="it is the number of candidates that are compared.",
            fix='Set 2 or more, or name decoding="greedy".', argument="top_k",
        )  # fmt: skip
    return count
