"""Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers"): momentum whose update is orthogonalised.

`torch.optim.Muon` orthogonalises in bfloat16, which processors without bfloat16 products run four times slower than
float32 (measured on the machine this model was trained on); this one works in float32 and takes all matrices of one
shape through one batched product.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

# Quintic Newton-Schulz coefficients of the reference implementation: fast, to singular values in about [0.7, 1.2].
A, B, C = 3.4445, -4.7750, 2.0315
ITERATIONS = 5


def orthogonalise(g: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices, approximately. g: [N, R, C] float32 -> same shape."""
    transposed = g.shape[1] > g.shape[2]
    x = g.mT if transposed else g
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        s = x @ x.mT
        x = A * x + (B * s + C * s @ s) @ x
    result: Tensor = x.mT if transposed else x
    return result


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, scaled to the size of an AdamW step (Liu et al. 2025, section 2.2)."""

    def __init__(self, params: Iterable[Tensor], *, lr: float, momentum: float = 0.95, weight_decay: float = 0.1):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                by_shape[p.shape].append(p)
            for shape, parameters in by_shape.items():
                updates = []
                for p in parameters:
                    assert p.grad is not None
                    momentum: Tensor = self.state[p].setdefault("momentum", torch.zeros_like(p))
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(momentum, group["momentum"]))
                scale = 0.2 * max(shape) ** 0.5
                for p, u in zip(parameters, orthogonalise(torch.stack(updates)), strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(u, alpha=-group["lr"] * scale)
