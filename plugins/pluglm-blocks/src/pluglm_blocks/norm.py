"""Normalisation layers: a learned scale (and shift) around the ops of `pluglm_blocks.ops`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pluglm.contracts import Norm
from pluglm_blocks import ops


class RMSNorm(nn.Module):
    """Zhang & Sennrich 2019. Parameter: weight [C], unless the norm has none.

    A `cast_late` norm always runs the reference: kernels are written for `rms_norm`, which rounds elsewhere.
    """

    def __init__(self, norm: Norm, kernels: Mapping[str, Callable[..., Any]], dtype: torch.dtype) -> None:
        super().__init__()
        self.eps, self.offset = norm.eps, norm.offset
        self.weight = nn.Parameter(torch.full((norm.size,), 1.0 - norm.offset, dtype=dtype)) if norm.weight else None
        self._op = ops.rms_norm_cast_late if norm.cast_late else kernels.get("rms_norm", ops.rms_norm)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        normed: Tensor = self._op(x, self.weight, self.eps, self.offset)
        return normed


class LayerNorm(nn.Module):
    """Ba et al. 2016. Parameters: weight [C] and bias [C], as the norm has them. Rounds once, cast_late or not."""

    def __init__(self, norm: Norm, kernels: Mapping[str, Callable[..., Any]], dtype: torch.dtype) -> None:
        super().__init__()
        self.eps, self.offset = norm.eps, norm.offset
        self.weight = nn.Parameter(torch.full((norm.size,), 1.0 - norm.offset, dtype=dtype)) if norm.weight else None
        self.bias = nn.Parameter(torch.zeros(norm.size, dtype=dtype)) if norm.bias else None
        self._op = kernels.get("layer_norm", ops.layer_norm)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]."""
        weight = self.weight + self.offset if self.offset and self.weight is not None else self.weight
        normed: Tensor = self._op(x, weight, self.bias, self.eps)
        return normed


def refusals(norm: Norm) -> list[str]:
    """Every reason why this norm cannot be built; empty: it can."""
    reasons = []
    if norm.kind not in ("rms", "layer"):
        reasons.append(f"norm kind {norm.kind!r} is neither 'rms' nor 'layer'")
    if norm.kind == "rms" and norm.bias:
        reasons.append("an rms norm has no bias")
    if norm.offset and not norm.weight:
        reasons.append(f"a norm without a weight has nothing to add the offset {norm.offset} to")
    return reasons


def build_norm(norm: Norm, kernels: Mapping[str, Callable[..., Any]], dtype: torch.dtype) -> RMSNorm | LayerNorm:
    """The module of one `Norm`. kernels: op name -> callable, for the ops that a kernel plugin was chosen for."""
    return (RMSNorm if norm.kind == "rms" else LayerNorm)(norm, kernels, dtype)
