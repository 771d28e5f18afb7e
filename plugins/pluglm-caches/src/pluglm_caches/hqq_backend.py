"""Scales and zeros by half-quadratic quantization, from the package `hqq`; imported when a cache asks for it.

The zero of a group is moved to where an l_p norm of its errors, p = 0.7, is small: outliers may be cut off for the sake
of all others. So `scale / 2` bounds no error here. A zero that would make the norm larger stays where it was.

Source: Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models"; `hqq.core.optimize` 0.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pluglm_caches.affine import encode, span

_NORM = 0.7
# Without early stopping: the package would stop when the mean error of all groups together stops falling, and what is
# stored of one row would depend on the rows beside it.
_HOW = {
    "lp_norm": _NORM, "beta": 1e1, "kappa": 1.01, "iters": 20, "tol": 0.0, "early_stop": False,
    "scale_gridsearch": False,
}  # fmt: skip


def missing() -> str:
    """Why the package cannot be used; empty: it can."""
    try:
        import hqq.core.optimize  # noqa: F401 - needs torch and numpy only, not the rest of what hqq depends on
    except ImportError as error:
        return f"its variant 'hqq' needs the package hqq ({error}): pip install \"pluglm-caches[hqq]\""
    return ""


def half_quadratic(x: Tensor, axis: int, levels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The `Fit` that begins with `span` and moves the zeros. `missing()` has said that it can."""
    from hqq.core.optimize import optimize_weights_proximal_v2

    scale, zero = span(x, axis, levels, dtype)
    steps = 1 / scale.to(x.dtype)  # hqq counts in steps: code = x · steps + offset
    _, _, offset = optimize_weights_proximal_v2(
        x, steps, -zero.to(x.dtype) * steps, [0, levels], axis=axis, dtype=x.dtype, opt_params=_HOW
    )
    moved = (-offset / steps).to(dtype)

    def error(zero: Tensor) -> Tensor:
        made = zero.to(x.dtype) + scale.to(x.dtype) * encode(x, scale, zero, levels)
        return (x - made).abs().pow(_NORM).sum(axis, keepdim=True)

    return scale, torch.where(error(moved) < error(zero), moved, zero)
