"""What changes scores before a token is chosen, the same for every strategy; numbers and order as in transformers 5.

Order: repetition penalty, minimum of new tokens, then the caller's own. Warpers come after (`warpers.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pluglm.contracts import GenerationConfig, LogitsProcessor


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
        penalised = torch.where(scores < 0, scores * self.penalty, scores / self.penalty)
        return torch.where(self._seen, penalised, scores)


def _without_padding(ids: Tensor, mask: Tensor) -> Tensor:
    """Padding replaced by a real token of the same row; cells after the mask's end are real."""
    real = mask.bool()
    first = ids.gather(1, real.int().argmax(1, keepdim=True))  # [B, 1]
    prompt = torch.where(real, ids[:, : mask.shape[1]], first)
    return torch.cat((prompt, ids[:, mask.shape[1] :]), dim=1)


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


class Processors:
    """All processors of one call, in order, on float32 scores.

    Args:
        own: the caller's. prompt_length, mask: of the prompts, [R, S].
        incremental: as in `RepetitionPenalty`.
    """

    def __init__(
        self, config: GenerationConfig, own: Sequence[LogitsProcessor] | None, *, prompt_length: int,
        mask: Tensor | None, device: torch.device, incremental: bool = True,
    ) -> None:  # fmt: skip
        self._chain: list[LogitsProcessor] = []
        if config.repetition_penalty not in (None, 1.0):
            self._chain.append(RepetitionPenalty(float(config.repetition_penalty), mask, incremental=incremental))
        if config.min_new_tokens and config.eos_token_id:
            eos = torch.tensor(config.eos_token_id, device=device)
            self._chain.append(MinNewTokens(prompt_length, config.min_new_tokens, eos))
        self._foreign = bool(own)
        self._chain.extend(own or ())

    @property
    def idle(self) -> bool:
        """There is nothing to do: scores are the logits."""
        return not self._chain

    def __call__(self, input_ids: Tensor, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Process the model's logits.

        Args:
            input_ids: [R, S]. logits: [R, V] in the model's dtype, left as they are.
        Returns: scores [R, V] float32 (the logits themselves if there is nothing to do), and the best of the untouched
            logits [R] if a caller's processor could have hidden that they are not finite.
        """
        if not self._chain:
            return logits, None
        raw = logits.amax(-1).float() if self._foreign else None
        # A caller's processor may write in place; the model's output may be a buffer it uses again.
        scores = logits.to(torch.float32, copy=True)
        for process in self._chain:
            scores = process(input_ids, scores)
        return scores, raw


def known_best(best: Tensor, raw: Tensor | None) -> Tensor:
    """The best score; where the model's own was no finite number, that one, whatever a processor made of it.

    Args:
        best: [R] after all processing. raw: as `Processors` gave it.
    """
    return best if raw is None else torch.where(raw.isfinite(), best.float(), raw)
