"""What must, or must not, come at a certain place: end tokens too early, first tokens, last tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pluglm_decoding_blocks.texts import Texts


class MinNewTokens:
    """End tokens are forbidden until `count` new tokens are there (transformers MinNewTokensLengthLogitsProcessor)."""

    def __init__(self, prompt_length: int, count: int, eos: Tensor) -> None:
        self._until = prompt_length + count
        self._eos = eos

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V] scores; `scores` itself is left as it was."""
        if input_ids.shape[1] >= self._until:
            return scores
        return scores.index_fill(1, self._eos, -torch.inf)


class AtCounts:
    """Acts on rows that have a certain number of new tokens, which may be another one for each.

    Args:
        counts: new tokens before the one that is meant; one for all rows, or one a row.
        ids: [E] int64. only: the ids are the only ones that are allowed, all alike; else they are forbidden.
    """

    def __init__(self, texts: Texts, counts: Sequence[int], ids: Tensor, *, only: bool) -> None:
        self._texts, self._ids, self._only = texts, ids, only
        self._known = frozenset(counts)
        self._counts = torch.tensor(counts, device=ids.device)[:, None]  # [R or 1, 1]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[R, V]; the scores themselves where no row is there."""
        count = self._texts.count(input_ids)
        if count not in self._known:
            return scores
        if self._only:
            changed = torch.full_like(scores, -torch.inf).index_fill_(1, self._ids, 0.0)
        else:
            changed = scores.index_fill(1, self._ids, -torch.inf)
        return torch.where(self._counts == count, changed, scores)


class MinLength:
    """End tokens are forbidden until prompt and new tokens together are `least`; padding is neither.

    Source: transformers 5.23 MinLengthLogitsProcessor.
    """

    def __init__(self, texts: Texts, least: int, eos: Tensor) -> None:
        self._texts, self._eos = texts, eos
        self._last = least - min(texts.lengths)
        self._until = torch.tensor([least - length for length in texts.lengths], device=eos.device)[:, None]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[R, V]."""
        count = self._texts.count(input_ids)
        if count >= self._last:
            return scores
        return torch.where(self._until > count, scores.index_fill(1, self._eos, -torch.inf), scores)


def forced_bos(texts: Texts, ids: Tensor) -> AtCounts:
    """The only token after a prompt of one token, as decoders begin (transformers ForcedBOSTokenLogitsProcessor)."""
    return AtCounts(texts, [0 if length == 1 else NEVER for length in texts.lengths], ids, only=True)


def forced_eos(texts: Texts, limits: Sequence[int], ids: Tensor) -> AtCounts:
    """The only tokens at each row's limit (transformers ForcedEOSTokenLogitsProcessor). limits: new tokens of each."""
    return AtCounts(texts, [limit - 1 for limit in limits], ids, only=True)


def begin_suppressed(texts: Texts, ids: Tensor, *, bos_forced: bool) -> AtCounts:
    """Not the first new token; after a forced one not the second.

    Source: transformers 5.23 SuppressTokensAtBeginLogitsProcessor and what `generate` tells it.
    """
    return AtCounts(texts, [int(bos_forced and length == 1) for length in texts.lengths], ids, only=False)


#: No number of new tokens.
NEVER = -1
