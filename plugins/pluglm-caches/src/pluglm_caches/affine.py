"""Groups of numbers as small whole numbers: x ≈ zero + scale · code, with a scale and a zero of 16 bits a group.

The zero is rounded down and the scale up, and codes are made for the rounded pair. So the pair still spans the whole
group, and no number is off by more than half a step, `scale / 2`, whatever the 16 bits lost.

Source: Liu et al. 2024, "KIVI", equation 1 (asymmetric round-to-nearest); the directed rounding is ours.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class Fit(Protocol):
    """Chooses the scale and the zero of every group."""

    def __call__(self, x: Tensor, axis: int, levels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Scales, all above zero, and zeros.

        Args:
            x: float32 or wider; each line along `axis` is a group. levels: the largest code. dtype: of both results.
        Returns: scale and zero in x's shape with `axis` of size 1.
        """
        ...


def span(x: Tensor, axis: int, levels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The `Fit` that reaches from the least number of a group to the greatest."""
    zero = below(x.amin(axis, keepdim=True), dtype)
    reach = x.amax(axis, keepdim=True) - zero.to(x.dtype)
    scale = -below(-reach / levels, dtype)  # rounded up
    return scale.clamp_min(torch.finfo(dtype).tiny), zero


def below(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The greatest numbers of a 16-bit floating dtype that are not above x."""
    near = x.to(dtype)
    ordinal = near.view(torch.int16)
    # Sign and magnitude: one step down is a smaller magnitude above zero and a greater one below it, from -0 on.
    lower = torch.where(near > 0, ordinal - 1, ordinal + 1).view(dtype)
    return torch.where(near.to(x.dtype) > x, lower, near)


def encode(x: Tensor, scale: Tensor, zero: Tensor, levels: int) -> Tensor:
    """The nearest codes, uint8 in x's shape. scale, zero: as stored, broadcastable to x."""
    return ((x - zero.to(x.dtype)) / scale.to(x.dtype)).round_().clamp_(0, levels).to(torch.uint8)


def decode(codes: Tensor, scale: Tensor, zero: Tensor, dtype: torch.dtype) -> Tensor:
    """zero + scale · code, computed in float32 or wider and rounded to `dtype` once."""
    wide = torch.promote_types(dtype, torch.float32)
    return codes.to(wide).mul_(scale.to(wide)).add_(zero.to(wide)).to(dtype)
