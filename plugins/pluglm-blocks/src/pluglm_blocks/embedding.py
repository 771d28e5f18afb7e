"""The two ends of a decoder: the scale of token vectors, and a head that reuses their table."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TiedHead(nn.Module):
    """x @ embedding.T (+ bias): Press & Wolf 2017, "Using the Output Embedding". Parameter: bias [V], if any.

    It refers to the embedding without owning it, so the table has one name and one copy.
    """

    def __init__(self, embedding: nn.Embedding, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, so that it is not registered a second time
        self.bias = nn.Parameter(torch.zeros(embedding.num_embeddings, dtype=dtype)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, C] -> [B, T, V]."""
        return F.linear(x, self._embedding[0].weight, self.bias)


def rounded(scale: float, dtype: torch.dtype) -> float:
    """`scale` as `dtype` can say it: Gemma multiplies by sqrt(C) rounded to bfloat16, and was trained so."""
    return float(torch.tensor(scale, dtype=dtype, device="cpu"))
