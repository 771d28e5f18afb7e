"""Which tokens of a pass are real, for the parts that read a row from left to right and must not see its padding.

Attention masks padding where it lies. A convolution or a recurrence has no mask: what stands between two tokens takes
part. So a row's real tokens are moved together, to its front and in their order, and moved back afterwards; in between,
the padding is behind them, where nothing real reads it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Ragged:
    """The real tokens of one pass, with padding on either side, between them, or in place of a whole row.

    Attributes:
        counts: [B or 1, 1] int64, real tokens of each row.
        real: [B or 1, T] bool, the cells that hold them once they are at the front.
        order: [B or 1, T] int64, which token each cell holds then. back: the inverse. None: T is 1, nothing moves.
    """

    counts: Tensor
    real: Tensor
    order: Tensor | None
    back: Tensor | None

    @classmethod
    def of(cls, positions: Tensor) -> Ragged:
        """From the positions [B or 1, T] of a pass; negative: padding."""
        T = positions.shape[1]
        padding = positions < 0
        counts = T - padding.sum(1, keepdim=True)
        if T == 1:
            return cls(counts, ~padding, None, None)
        order = padding.int().argsort(stable=True, dim=1)
        return cls(counts, torch.arange(T, device=positions.device) < counts, order, order.argsort(1))

    def to_front(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, C], each row's real tokens first."""
        return _moved(x, self.order)

    def to_places(self, x: Tensor) -> Tensor:
        """The inverse of `to_front`."""
        return _moved(x, self.back)


def _moved(x: Tensor, places: Tensor | None) -> Tensor:
    return x if places is None else x.gather(1, places[:, :, None].expand(x.shape))
