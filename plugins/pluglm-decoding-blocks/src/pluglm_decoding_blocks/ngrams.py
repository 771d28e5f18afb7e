"""No run of n tokens twice: in the text, or taken over from the text it is made of."""

from __future__ import annotations

import torch
from torch import Tensor

from pluglm_decoding_blocks.texts import NO_TOKEN, Texts


class NoRepeat:
    """A token that would complete a run of `size` tokens which the text holds already is forbidden.

    Source: transformers 5.23 NoRepeatNGramLogitsProcessor. Runs with padding in them are none.
    """

    def __init__(self, texts: Texts, size: int) -> None:
        self._texts, self._size = texts, size

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[R, V]."""
        text = self._texts.real(input_ids)
        if text.shape[1] < self._size:
            return scores
        return _forbid(text.unfold(1, self._size, 1), text, scores)


class NoCopy:
    """A token that would complete a run of `size` tokens of the source is forbidden.

    The source is the prompt of a decoder-only model, or an encoder's input. Source: transformers 5.23
    EncoderNoRepeatNGramLogitsProcessor.

    Args:
        ids, mask: of an encoder's input, [B, Te], for a multiple of B rows; ids None: the prompt is the source.
    """

    def __init__(self, texts: Texts, size: int, ids: Tensor | None, mask: Tensor | None) -> None:
        self._texts, self._size = texts, size
        self._source = Texts(ids.shape[1], mask).real(ids) if ids is not None else None  # [B, Te]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[R, V]."""
        text = self._texts.real(input_ids)
        source = text[:, : self._texts.prompt_length] if self._source is None else self._source
        if source.shape[1] < self._size or text.shape[1] < self._size - 1:
            return scores
        runs = source.unfold(1, self._size, 1)
        return _forbid(runs.repeat_interleave(text.shape[0] // source.shape[0], 0), text, scores)


def _forbid(runs: Tensor, text: Tensor, scores: Tensor) -> Tensor:
    """[R, V] scores, -inf for the last token of every run whose other tokens the text ends with.

    Args:
        runs: [R, W, n], padding on the left. text: [R, S].
    """
    V, n = scores.shape[1], runs.shape[2]
    end = text[:, text.shape[1] + 1 - n :]  # [R, n - 1]
    found = (runs[:, :, :-1] == end[:, None]).all(-1) & (runs[:, :, 0] != NO_TOKEN)  # [R, W]
    last = torch.where(found, runs[:, :, -1], V)  # column V is for runs that end nowhere
    forbidden = torch.zeros(scores.shape[0], V + 1, dtype=torch.bool, device=scores.device).scatter_(1, last, True)
    return scores.masked_fill(forbidden[:, :V], -torch.inf)
