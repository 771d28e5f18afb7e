"""Which tokens are possible at all: by the caller's word, by a list, or because their scores are numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import index
from typing import Any

import torch
from torch import Tensor

from pluglm.errors import InputError
from pluglm_decoding_blocks.texts import NO_TOKEN, Texts

#: (number of the prompt, its text so far [S], padding left out) -> ids that may follow.
PrefixFunction = Callable[[int, Tensor], Sequence[int]]


class PrefixAllowed:
    """Only the tokens that the caller's function names after each row's text.

    Where other processors have forbidden all of them in every row of a prompt, they are allowed again, all alike. Where
    it names none, the row has no token, and fails if it has not ended. Source: transformers 5.23
    PrefixConstrainedLogitsProcessor.

    Args:
        rows: of each prompt; the function is told the number of the prompt.
    """

    def __init__(self, texts: Texts, function: PrefixFunction, rows: int) -> None:
        self._texts, self._function, self._rows = texts, function, rows

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[R, V]."""
        mask = torch.full_like(scores, -torch.inf)
        for row, text in enumerate(self._texts.real(input_ids)):
            allowed = self._function(row // self._rows, text[text != NO_TOKEN])
            mask[row, _ids(allowed, scores.shape[1])] = 0.0
        left = scores + mask
        nothing = (left.amax(-1) == -torch.inf).view(-1, self._rows).all(-1)  # [B]
        return torch.where(nothing.repeat_interleave(self._rows)[:, None], mask, left)


def _ids(allowed: Any, vocab_size: int) -> list[int]:
    """What the caller's function returned, as a list. Raises InputError if it names no tokens of the vocabulary."""
    try:
        ids = [index(token) for token in allowed]
    except TypeError:
        ids = [-1]
    if not all(0 <= token < vocab_size for token in ids):
        raise InputError(
            f"prefix_allowed_tokens_fn returned {allowed!r}.",
            why=f"it must return a list of token ids, each from 0 to {vocab_size - 1}.",
            fix="Return [] where nothing may follow.", argument="prefix_allowed_tokens_fn",
        )  # fmt: skip
    return ids


class Suppress:
    """These tokens never (transformers 5.23 SuppressTokensLogitsProcessor). ids: [E] int64."""

    def __init__(self, ids: Tensor) -> None:
        self._ids = ids

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[R, V]."""
        return scores.index_fill(1, self._ids, -torch.inf)


def remove_invalid(scores: Tensor) -> Tensor:
    """NaN becomes 0, infinities the largest and smallest numbers (transformers 5.23 InfNanRemoveLogitsProcessor)."""
    largest = torch.finfo(scores.dtype).max
    return scores.nan_to_num(nan=0.0, posinf=largest, neginf=-largest)
