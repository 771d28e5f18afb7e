"""Keeps the hypotheses of one prompt."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class Hypotheses:
    size: int
    length_penalty: float = 1.0
    kept: list[tuple[float, torch.Tensor]] = field(default_factory=list)

    def add(self, total: float, ids: torch.Tensor, made: int) -> None:
        self.kept.append((total / made**self.length_penalty, ids))
        self.kept = sorted(self.kept, key=lambda pair: -pair[0])[: self.size]

    def is_full(self) -> bool:
        return len(self.kept) >= self.size
