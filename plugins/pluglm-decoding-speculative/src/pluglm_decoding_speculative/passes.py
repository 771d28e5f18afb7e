"""Forward passes of a ragged batch: each row is fed a number of tokens of its own and keeps a number of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pluglm.contracts import Cache


class Passes:
    """A model and its cache, which holds every row's prompt.

    Cells that a row does not use, and tokens that it takes back while another keeps its own, become holes. A batch of
    one row never has any.
    """

    def __init__(self, model: Any, cache: Cache, device: torch.device) -> None:
        self.cache = cache
        self._model, self._device = model, device

    def feed(self, rows: Sequence[Sequence[int]], *, keep: int | None = None) -> Tensor:
        """One pass.

        Args:
            rows: tokens of each row; T is the most that one has, the others are padded behind.
            keep: how many of the last logits to compute; None: all.
        Returns: logits [R, T or keep, V].
        """
        lengths = [len(row) for row in rows]
        T = max(lengths)
        ids = torch.tensor([[*row, *[0] * (T - len(row))] for row in rows], device=self._device)
        positions = None  # then the cache stays dense, if it is
        if min(lengths) != T:
            used = torch.arange(T) < torch.tensor(lengths)[:, None]  # [R, T]
            positions = torch.where(used.to(self._device), self.cache.next_positions(T), -1)
        logits: Tensor = self._model.step(ids, self.cache, positions=positions, logits_to_keep=keep or T)
        return logits

    def take_back(self, counts: Sequence[int]) -> None:
        """Each row gives back its last `counts[row]` cells."""
        lowest, highest = min(counts), max(counts)
        if lowest != highest:
            self.cache.rollback(torch.tensor(counts))
        elif highest:
            self.cache.rollback(highest)
