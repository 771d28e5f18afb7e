"""From a weight to codes, scales and zeros: min and max of each group, then zeros that a few outliers do not rule.

The zero of each group is moved, in rounds, to where the errors are small in the norm of exponent 0.7; weights that lie
far off may then be cut. The package stops when the mean error of the whole layer stops falling.

Source: Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models"; `Quantizer.quantize` and
`optimize_weights_proximal` of hqq 0.2.8.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pluglm_quantizer_hqq.settings import Grid

#: Groups that are narrower than this are not stretched, and no scale is finer: both would leave float16.
_NARROW, _FINEST = 1e-4, 2e4


def half_quadratic(weight: Tensor, grid: Grid) -> tuple[Tensor, Tensor, Tensor]:
    """Round a weight.

    Args:
        weight: [out, in]. grid: one that fits it.
    Returns: codes in float32, [groups, group] (axis 1) or [group, groups] (axis 0); scale and zero in float32, of one
        column or one row: the weight is (codes - zero) * scale.
    """
    from hqq.core.optimize import optimize_weights_proximal

    size = grid.size(*weight.shape)
    w = weight.detach().float()
    w = w.reshape(-1, size) if grid.axis == 1 else w.reshape(size, -1)
    low, high = w.amin(grid.axis, keepdim=True), w.amax(grid.axis, keepdim=True)
    top = (1 << grid.bits) - 1
    steps = torch.where((high - low).abs() <= _NARROW, 1.0, top / (high - low)).clamp(max=_FINEST)
    zero = -low * steps
    if grid.bits == 4:  # as the package's own settings have it
        zero = zero.round()
    codes, steps, zero = optimize_weights_proximal(
        tensor=w, scale=steps, zero=zero, min_max=[0, top], axis=grid.axis, device=w.device
    )
    # The package computes in inference mode; copies may be saved, moved and compiled as any other tensor.
    return codes.clone(), 1 / steps.clone(), zero.clone()
