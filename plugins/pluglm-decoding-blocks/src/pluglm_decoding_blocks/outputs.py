"""What a call asked to see of every step: scores, logits, hidden states."""

from __future__ import annotations

from typing import TypedDict

import torch
from torch import Tensor

from pluglm_decoding_blocks.settings import Settings


class Recorded(TypedDict):
    """The fields of GenerationOutput that hold one entry a step."""

    scores: tuple[Tensor, ...] | None
    logits: tuple[Tensor, ...] | None
    hidden_states: tuple[tuple[Tensor, ...], ...] | None


class Outputs:
    """Copies of what was asked for; the originals may be buffers that the next step uses again."""

    def __init__(self, settings: Settings) -> None:
        self._scores: list[Tensor] | None = [] if settings.scores else None
        self._logits: list[Tensor] | None = [] if settings.logits else None
        self._hidden: list[tuple[Tensor, ...]] | None = [] if settings.hidden_states else None

    def record(self, logits: Tensor, scores: Tensor, hidden: tuple[Tensor, ...] | None) -> None:
        """One step. logits: [R, V] as the model gave them. scores: [R, V]. hidden: L + 1 tensors [R, T, C]."""
        if self._scores is not None:
            self._scores.append(scores.to(torch.float32, copy=True))
        if self._logits is not None:
            self._logits.append(logits.clone())
        if self._hidden is not None:
            assert hidden is not None  # the feed was told to ask for them
            self._hidden.append(tuple(state.clone() for state in hidden))

    def result(self, steps: int) -> Recorded:
        """Of the first `steps`: a loop may have run one too far."""
        return Recorded(
            scores=None if self._scores is None else tuple(self._scores[:steps]),
            logits=None if self._logits is None else tuple(self._logits[:steps]),
            hidden_states=None if self._hidden is None else tuple(self._hidden[:steps]),
        )
