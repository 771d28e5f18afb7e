"""Scores of single tokens made better or worse by what the text holds and how long it is."""

from __future__ import annotations

import torch
from torch import Tensor

from pluglm_decoding_blocks.texts import Texts


class RepetitionPenalty:
    """Scores of tokens that occurred are divided by `penalty` where positive, multiplied where negative.

    Source: Keskar et al. 2019, "CTRL", section 4.1; signs as in transformers 5.23 RepetitionPenaltyLogitsProcessor.
    Padding does not count as an occurrence, so that a row's result is the same alone and in a padded batch.

    Args:
        penalty: > 0. mask: [B, S] of the prompt, 0 for padding; None: no padding.
        incremental: each call's ids are those of the call before and one more. False: any ids, looked at anew.
    """

    def __init__(self, penalty: float, mask: Tensor | None = None, *, incremental: bool = True) -> None:
        self.penalty = penalty
        self._mask = mask
        self._incremental = incremental
        self._seen: Tensor | None = None  # [B, V] bool
        self._length = 0  # cells of the sequence that are in it

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[B, V] scores after the penalty. input_ids: [B, S]."""
        fits = self._seen is not None and self._seen.shape == scores.shape and input_ids.shape[1] >= self._length
        if self._seen is None or not (fits and self._incremental):
            self._seen, self._length = torch.zeros_like(scores, dtype=torch.bool), 0
        new = input_ids[:, self._length :]
        if self._length == 0 and self._mask is not None:
            new = _without_padding(new, self._mask)
        self._seen.scatter_(1, new, True)
        self._length = input_ids.shape[1]
        return _penalised(scores, self._seen, self.penalty)


class SourcePenalty:
    """Tokens of the source text (the prompt, or an encoder's input) made likelier: the penalty turned round.

    Source: transformers 5.23 EncoderRepetitionPenaltyLogitsProcessor. Padding does not count.

    Args:
        penalty: > 0; above 1 favours the source's tokens. ids, mask: of an encoder's input, [B, Te], for a multiple of
            B rows; ids None: the first `length` cells of each call's ids are the source.
        length: S of the prompts. mask without ids: [R, S].
    """

    def __init__(self, penalty: float, ids: Tensor | None, mask: Tensor | None, *, length: int) -> None:
        self._penalty, self._ids, self._mask, self._length = 1 / penalty, ids, mask, length
        self._seen: Tensor | None = None  # [R, V] bool

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[R, V] scores after the penalty."""
        if self._seen is None or self._seen.shape != scores.shape:
            ids = input_ids[:, : self._length] if self._ids is None else self._ids
            if self._mask is not None:
                ids = _without_padding(ids, self._mask)
            seen = torch.zeros(ids.shape[0], scores.shape[1], dtype=torch.bool, device=scores.device)
            seen.scatter_(1, ids, True)
            self._seen = seen.repeat_interleave(scores.shape[0] // ids.shape[0], 0)
        return _penalised(scores, self._seen, self._penalty)


class ExponentialDecay:
    """End tokens gain, ever more with each new token after the first `start`.

    An end token's score s gains |s| · (factor ** (count - start) - 1), where s is finite; count: of the new tokens.
    Source: transformers 5.23 ExponentialDecayLengthPenalty.

    Args:
        eos: [E] int64.
    """

    def __init__(self, texts: Texts, start: int, factor: float, eos: Tensor) -> None:
        self._texts, self._start, self._factor, self._eos = texts, start, factor, eos

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """[R, V]; the scores themselves until more than `start` new tokens are there."""
        late = self._texts.count(input_ids) - self._start
        if late <= 0:
            return scores
        ends = scores[:, self._eos]  # [R, E]
        largest = torch.finfo(scores.dtype).max
        grown = (ends + ends.abs() * self._gain(late, largest)).clamp(max=largest)
        return scores.index_copy(1, self._eos, torch.where(ends.isfinite(), grown, ends))

    def _gain(self, late: int, largest: float) -> float:
        """factor ** late - 1; a long text makes it too large for any number."""
        try:
            return min(self._factor**late - 1, largest)
        except OverflowError:
            return largest


def _penalised(scores: Tensor, seen: Tensor, penalty: float) -> Tensor:
    worse = torch.where(scores < 0, scores * penalty, scores / penalty)
    return torch.where(seen, worse, scores)


def _without_padding(ids: Tensor, mask: Tensor) -> Tensor:
    """Padding replaced by a real token of the same row; cells after the mask's end are real."""
    real = mask.bool()
    first = ids.gather(1, real.int().argmax(1, keepdim=True))  # [B, 1]
    prompt = torch.where(real, ids[:, : mask.shape[1]], first)
    return torch.cat((prompt, ids[:, mask.shape[1] :]), dim=1)
