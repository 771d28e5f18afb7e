"""Which candidates end, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from pluglm_decoding_blocks.settings import Settings
from torch import Tensor

from pluglm.contracts import FinishReason, StoppingCriterion
from pluglm_decoding_beam.hypotheses import Beam


class Ends:
    """The rules of one call. criteria: the caller's. decode: token ids -> text; needed where there are stop strings."""

    def __init__(
        self, settings: Settings, criteria: Sequence[StoppingCriterion], decode: Callable[[Sequence[int]], str] | None
    ) -> None:
        self._eos, self._stop, self._min_new = frozenset(settings.eos), settings.stop, settings.min_new
        self._criteria, self._decode = tuple(criteria), decode

    def asked(self, sequences: Tensor, places: Tensor, tokens: Tensor) -> list[list[bool]]:
        """What the caller's criteria say of every candidate.

        Args:
            sequences: [B, W, S] of the beams. places, tokens: [B, K] of the candidates.
        Returns: [B][K].
        """
        if not self._criteria:
            return [[False] * tokens.shape[1]] * tokens.shape[0]
        parents = sequences.gather(1, places[:, :, None].expand(-1, -1, sequences.shape[2]))  # [B, K, S]
        ids = torch.cat((parents, tokens[:, :, None]), dim=2).flatten(0, 1)  # [B * K, S + 1]
        done = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
        for criterion in self._criteria:
            done = done | criterion(ids, None).to(ids.device, torch.bool)
        answers: list[list[bool]] = done.view(tokens.shape).tolist()
        return answers

    def reason(self, beam: Beam, length: int, limit: int, *, asked: bool) -> FinishReason | None:
        """Why this candidate of `length` new tokens ends; None: it goes on. asked: the caller's criteria end it."""
        if beam.token in self._eos:
            return "eos"
        if self._stop and length >= self._min_new and self._holds_stop(beam):
            return "stop"
        if asked:
            return "stop"
        return "length" if length >= limit else None

    def _holds_stop(self, beam: Beam) -> bool:
        assert self._decode is not None  # `read_settings` has looked
        text = self._decode(beam.tokens())
        return any(stop in text for stop in self._stop)
