"""The two ends of a decoder: the scale of token vectors, and a head that reuses their table."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TiedHead(nn.Module):
    """x @ table.T (+ bias): Press & Wolf 2017, "Using the Output Embedding". Parameter: bias [V], if any.

    It refers to the table without owning it, so the table has one name and one copy. It is a
    `pluglm.contracts.TableReader`: when a quantizer replaces the table, it is told.
    """

    def __init__(self, embedding: nn.Embedding, bias: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self._table: tuple[Any] = (embedding,)  # in a tuple, so that it is not registered a second time
        self._is_plain = True
        self.bias = nn.Parameter(torch.zeros(embedding.num_embeddings, dtype=dtype)) if bias else None

    @property
    def table(self) -> nn.Module:
        """The embedding, or the `BlockedEmbedding` in its place."""
        table: nn.Module = self._table[0]
        return table

    def take_table(self, table: nn.Module) -> None:
        """Multiply by this table from now on."""
        self._table, self._is_plain = (table,), isinstance(table, nn.Embedding)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., V]."""
        table = self._table[0]
        logits: Tensor = F.linear(x, table.weight, self.bias) if self._is_plain else table.project(x, self.bias)
        return logits


def rounded(scale: float, dtype: torch.dtype) -> float:
    """`scale` as `dtype` can say it: Gemma multiplies by sqrt(C) rounded to bfloat16, and was trained so."""
    return float(torch.tensor(scale, dtype=dtype, device="cpu"))
