"""How a weight becomes whole numbers: to the nearest, or with the scale and offset of each group that lose least.

Each group of 32 weights x of a row becomes codes q with x ≈ scale * q + offset, scale and offset in float16. `nearest`
takes the scale from the largest magnitude (or the range) of the group. `search` tries several scales around it; for
each it rounds, then solves for the scale (and offset) with the least squared error for these codes, as k-means does for
its centres. At the end the codes are rounded again, and whichever of the tried and the nearest is better, measured on
what is stored, is kept: a group is never worse off than with `nearest`.

Sources: the search over scales followed by a least-squares fit is that of llama.cpp's k-quants (make_qx_quants and
make_qkx2_quants of ggml-quants.c); that codes and scales be fitted in turn is Lloyd's algorithm (1982). HQQ (Badri and
Shaji 2023) fits the offsets alone, under a norm below 1. Error feedback as in OBQ and GPTQ (Frantar et al. 2022) moves
the error of a column to those whose inputs go along with it: without data to measure inputs on, no two columns do, the
Hessian is diagonal, and nothing would be moved. So this package, which sees no data, has none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pluglm import CheckpointError
from pluglm.contracts import GroupedWeight
from pluglm.contracts.packed import BLOCK_GROUP as GROUP

Rounding = Literal["search", "nearest"]
Weighting = Literal["magnitude", "even"]

#: Weights that are rounded at once: what is computed for them fits a CPU's cache, or an accelerator's memory.
AT_ONCE = {"cpu": 2**17, "other": 2**23}
CANDIDATES = 8
#: Factors on the scale that just holds the largest magnitude, and how often scale and offset are then fitted.
SPAN = {4: (0.7, 1.1), 8: (0.9, 1.0)}
FITS = {False: 1, True: 3}
#: Scales are float16: above the first they overflow, and a layer that lies below the second has steps of its size.
LARGEST, SMALLEST = 65504.0, 2.0**-15


@dataclass(frozen=True)
class Grid:
    """What codes can say: low … high, symmetric about no offset, or with one. `shift` is taken off a stored code."""

    bits: int
    has_offset: bool

    @property
    def low(self) -> int:
        """The smallest code; the largest is -low - 1."""
        return -(1 << (self.bits - 1))

    @property
    def shift(self) -> int:
        """Codes of 4 bits with an offset are stored from 0 on (`pluglm.contracts.RowBlocks`)."""
        return -self.low if self.has_offset and self.bits == 4 else 0

    def codes(self, x: Tensor, scale: Tensor, offset: Tensor | float) -> Tensor:
        """The nearest codes, as numbers of x's dtype. Where the scale is 0: 0."""
        inverse = torch.where(scale == 0, 0.0, 1 / scale)
        return ((x - offset) * inverse).round_().clamp_(self.low, -self.low - 1)

    def stored(self, scale: Tensor, offset: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and offset as float16 keeps them; the offset is kept for codes from `shift` on."""
        scale = half(scale)
        return scale, half(offset - self.shift * scale) + self.shift * scale


@dataclass
class Best:
    """The least error of each group so far, and how it was reached: all [rows, groups, 1]."""

    error: Tensor
    scale: Tensor
    offset: Tensor

    def take(self, error: Tensor, scale: Tensor, offset: Tensor) -> None:
        """Keep what is better. An error that is no number is not."""
        better = error < self.error
        self.error = torch.where(better, error, self.error)
        self.scale = torch.where(better, scale, self.scale)
        self.offset = torch.where(better, offset, self.offset)


def rounded(
    name: str, weight: Tensor, *, bits: int, has_offset: bool, rounding: Rounding, weighting: Weighting
) -> GroupedWeight:
    """Round one layer's weight, some rows at a time.

    Args:
        name: for messages. weight: [out, in], `in` a multiple of 32. bits: 4 or 8.
        has_offset: each group has an offset beside its scale. weighting: what a squared error counts in the search:
            "even": 1; "magnitude": the group's root mean square plus the weight's magnitude, because what a model does
            hangs on its large weights.
    Returns: codes int8, or uint8 for 4 bits with offsets; scale and offset float32 that float16 holds exactly.
    Raises: CheckpointError for weights that are not finite, or that float16 scales cannot hold.
    """
    _check(name, weight)
    grid, (rows, columns) = Grid(bits, has_offset), weight.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8 if grid.shift else torch.int8, device=weight.device)
    scale = torch.empty(rows, columns // GROUP, device=weight.device)
    offset = torch.empty_like(scale) if has_offset else None
    step = max(1, AT_ONCE["cpu" if weight.device.type == "cpu" else "other"] // columns)
    for first in range(0, rows, step):
        part = slice(first, first + step)
        x = weight[part].float().view(-1, columns // GROUP, GROUP)
        best = nearest(x, grid) if rounding == "nearest" else search(x, grid, weighting)
        codes[part] = (grid.codes(x, best.scale, best.offset) + grid.shift).view(-1, columns).to(codes.dtype)
        scale[part] = best.scale.squeeze(-1)
        if offset is not None:
            offset[part] = (best.offset - grid.shift * best.scale).squeeze(-1)
    return GroupedWeight(bits, GROUP, codes, scale, offset)


def nearest(x: Tensor, grid: Grid) -> Best:
    """The scale that just holds the largest magnitude, or with an offset the range. x: [rows, groups, 32]."""
    if grid.has_offset:
        least, most = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        scale = half_above((most - least) / (2**grid.bits - 1))
        scale, offset = grid.stored(scale, least - grid.low * scale)
    else:
        scale = half_above(x.abs().amax(-1, keepdim=True) / (-grid.low - 1))
        offset = torch.zeros_like(scale)
    return Best(torch.full_like(scale, torch.inf), scale, offset)


def search(x: Tensor, grid: Grid, weighting: Weighting) -> Best:
    """The scale and offset of each group with the least (weighted) squared error of those tried.

    x: [rows, groups, 32].
    """
    w = None if weighting == "even" else x.abs() + x.square().mean(-1, keepdim=True).sqrt_()
    plain, symmetric = nearest(x, grid), nearest(x, Grid(grid.bits, has_offset=False))
    best = Best(torch.full_like(plain.scale, torch.inf), plain.scale, plain.offset)
    for scale, offset in (
        (plain.scale, plain.offset), grid.stored(symmetric.scale, symmetric.offset), _fitted(x, w, grid)
    ):  # fmt: skip
        lost = (x - offset).sub_(grid.codes(x, scale, offset).mul_(scale)).square_()
        best.take((lost if w is None else lost.mul_(w)).sum(-1, keepdim=True), scale, offset)
    return best


def _fitted(x: Tensor, w: Tensor | None, grid: Grid) -> tuple[Tensor, Tensor]:
    """The best of the tried scales, each with the least-squares scale and offset of the codes that it gives.

    The error is computed from sums over a group: sum(w x²) is the same for all that is tried and left out, and with an
    offset x is taken about its weighted mean, so that sum(w x) is 0 and nothing cancels.
    """
    total = torch.full_like(x[..., :1], GROUP) if w is None else w.sum(-1, keepdim=True)
    mean = torch.zeros_like(total)
    if grid.has_offset:
        mean = (x if w is None else x * w).sum(-1, keepdim=True).div_(total.clamp_min(1e-30))
        x = x - mean
        least, most = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        step, middle = (most - least) / (2**grid.bits - 1), (most + least) / 2
    else:  # the code of the largest magnitude is the lowest, which is further from 0 than the highest
        step = x.gather(-1, x.abs().argmax(-1, keepdim=True)) / grid.low
        middle = mean
    best = Best(torch.full_like(total, torch.inf), torch.zeros_like(total), mean)
    for factor in torch.linspace(*SPAN[grid.bits], CANDIDATES).tolist():
        scale = step * factor
        offset = middle + scale / 2 if grid.has_offset else middle  # of the codes low … high the middle is -1/2
        error = best.error
        for _ in range(FITS[grid.has_offset]):
            q = grid.codes(x, scale, offset)
            wq = q if w is None else q * w
            qx, qq = (wq * x).sum(-1, keepdim=True), (wq * q).sum(-1, keepdim=True)
            if grid.has_offset:
                q1 = wq.sum(-1, keepdim=True)
                scale = total * qx / (total * qq - q1.square())
                scale, offset = grid.stored(scale, mean - scale * q1 / total)
                offset -= mean
                error = scale * (scale * qq - 2 * qx + 2 * offset * q1) + offset.square() * total
            else:
                scale = half(qx / qq)
                error = scale * (scale * qq - 2 * qx)
        best.take(error, scale, offset + mean)
    return best.scale, best.offset


def half(t: Tensor) -> Tensor:
    """What float16 keeps, as float32."""
    return t.half().float()


def half_above(t: Tensor) -> Tensor:
    """The smallest float16 that is not below t >= 0, as float32: a scale that still holds the largest magnitude."""
    down = t.half()
    return torch.where(down.float() < t, (down.view(torch.int16) + 1).view(torch.float16), down).float()


def _check(name: str, weight: Tensor) -> None:
    least, most = (float(t) for t in torch.aminmax(weight))
    largest = max(-least, most)
    if not largest <= LARGEST:  # NaN, too
        why = "its weights are not finite." if largest != largest or largest == float("inf") else (
            f"its largest magnitude is {largest:.3g}, and scales and offsets are float16."
        )  # fmt: skip
    elif 0 < largest < SMALLEST:
        why = f"its largest magnitude is {largest:.3g}: scales are float16, which has no steps so small."
    else:
        return
    raise CheckpointError(
        f"the weight of {name!r} cannot be packed.", why=why,
        fix="Look at the checkpoint, or leave the layer out by name (quantizer_skip, or `skip` of lm.quantize).",
        tensor=f"{name}.weight",
    )  # fmt: skip
