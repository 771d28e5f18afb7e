"""The hidden states of the text so far, and how near to them a candidate's is."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class History:
    """The states of every row's cells, of length 1 each, float32.

    Args:
        states: [B, S, C] of the prompt. mask: [B, S], 0 for padding; None: every cell is real.
    """

    def __init__(self, states: Tensor, mask: Tensor | None) -> None:
        self._units = _unit(states)
        self._length = states.shape[1]
        self._padding = None if mask is None else mask[:, None] == 0  # [B, 1, S]

    def similarity(self, states: Tensor) -> Tensor:
        """[B, K] the largest cosine between each candidate's state [B, K, C] and those of its row's real cells."""
        cosines = _unit(states) @ self._units[:, : self._length].mT  # [B, K, cells]
        if self._padding is not None:
            prompt = cosines[:, :, : self._padding.shape[2]]
            prompt.masked_fill_(self._padding, -torch.inf)
        return cosines.amax(-1)

    def append(self, states: Tensor) -> None:
        """One more cell a row, [B, C]. Room grows by half, so that a state is copied a bounded number of times."""
        B, room, C = self._units.shape
        if self._length == room:
            more = self._units.new_empty(B, room // 2 + 16, C)
            self._units = torch.cat((self._units, more), dim=1)
        self._units[:, self._length] = _unit(states)
        self._length += 1


def _unit(states: Tensor) -> Tensor:
    return F.normalize(states.float(), dim=-1)
