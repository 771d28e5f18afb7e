"""Activations rounded to 8 bits before a product: part of what a W8A8 model is, whichever kernel multiplies."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT8_MAX = 448.0
#: The least largest value of a group whose scale is a power of two (DeepSeek-V3.1, inference/kernel.py).
POWER_FLOOR = 1e-4


@dataclass(frozen=True)
class Rounding:
    """How a layer's input is rounded; with a scale found in the input itself, or a stored one.

    Attributes:
        bits: of a whole number; None: float8_e4m3fn.
        symmetric: is the zero point 0?
        group_size: columns that share a scale; None: all columns of a token.
        static: the scale (and zero point) is stored with the layer.
        powers: scales are powers of two, rounded up ("ue8m0").
    """

    bits: int | None
    symmetric: bool = True
    group_size: int | None = None
    static: bool = False
    powers: bool = False

    def __call__(self, x: Tensor, scale: Tensor | None = None, zero: Tensor | None = None) -> Tensor:
        """What is left of the input.

        Args:
            x: [..., in] float32 or float64. scale, zero: [1], for `static`.
        Returns: the same shape and dtype.
        Source: compressed-tensors 0.20, `compute_dynamic_scales_and_zp` and `fake_quantize`; DeepSeek-V3, `act_quant`.
        """
        if self.static:
            assert scale is not None, "Form.check has seen it"
            return self._through(
                x, scale.to(x.dtype), torch.zeros_like(x[..., :1]) if zero is None else zero.to(x.dtype)
            )
        width = x.shape[-1]
        size = self.group_size or width
        padded = torch.nn.functional.pad(x, (0, -width % size)).reshape(*x.shape[:-1], -1, size)  # [..., groups, size]
        return self._through(padded, *self._found(padded)).flatten(-2)[..., :width]

    def _limits(self) -> tuple[float, float]:
        if self.bits is None:
            return -FLOAT8_MAX, FLOAT8_MAX
        return -float(1 << self.bits - 1), float((1 << self.bits - 1) - 1)

    def _found(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """scale and zero, [..., 1] each. 0 is always among the values that can be met."""
        least, most = self._limits()
        if self.symmetric:
            peak = x.abs().amax(-1, keepdim=True)
            peak = peak.clamp(min=POWER_FLOOR) if self.powers else peak
            scale = peak / ((most - least) / 2)
            scale = torch.exp2(torch.ceil(torch.log2(scale))) if self.powers else scale
            return _above_zero(scale), torch.zeros_like(scale)
        low, high = x.amin(-1, keepdim=True).clamp(max=0), x.amax(-1, keepdim=True).clamp(min=0)
        scale = _above_zero((high - low) / (most - least))
        return scale, (least - low / scale).clamp(least, most).round()

    def _through(self, x: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        least, most = self._limits()
        codes = (x / scale + zero).clamp(least, most)
        codes = codes.to(torch.float8_e4m3fn).to(x.dtype) if self.bits is None else codes.round()
        return (codes - zero) * scale


def _above_zero(scale: Tensor) -> Tensor:
    """Where all values are 0 any scale will do but 0."""
    return torch.where(scale == 0, torch.finfo(torch.float32).eps, scale)
