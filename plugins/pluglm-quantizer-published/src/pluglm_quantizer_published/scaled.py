"""The one meaning of all formats here: a weight is (code - zero) * scale, with scale and zero by row and group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pluglm.contracts import GroupedWeight


@dataclass(frozen=True)
class ScaledWeight:
    """A weight, unpacked but not multiplied out.

    Attributes:
        codes: [out, in] uint8, int8 or float8. bits: of a code.
        scale: [out, groups] float32. zero: the same, whole numbers in the codes' terms, or None where it is 0.
        group_size: columns that stand side by side in a group; the last group may have fewer.
        index: [in] int64, the group of each column where they do not stand side by side, or None.
    """

    codes: Tensor
    bits: int
    scale: Tensor
    zero: Tensor | None
    group_size: int
    index: Tensor | None = None

    @property
    def is_regular(self) -> bool:
        """Do groups of one size stand side by side?"""
        return self.index is None and self.codes.shape[1] % self.group_size == 0

    def dense(self, dtype: torch.dtype) -> Tensor:
        """[out, in] in `dtype`: the product in float32 (float64 for float64), then one rounding.

        A code and a scale of 16 bits have 24 bits together at most, so that float32 holds their product exactly.
        """
        wide = torch.float64 if dtype is torch.float64 else torch.float32
        weight = self.codes.to(wide, copy=True)
        if self.is_regular:
            view = weight.view(weight.shape[0], -1, self.group_size)
            if self.zero is not None:
                view -= self.zero[:, :, None]
            view *= self.scale[:, :, None]
        else:
            at = self.columns()
            if self.zero is not None:
                weight -= self.zero[:, at]
            weight *= self.scale[:, at]
        return weight.to(dtype)

    def columns(self) -> Tensor:
        """[in] int64: the group of each column."""
        if self.index is not None:
            return self.index
        return torch.arange(self.codes.shape[1], device=self.codes.device) // self.group_size

    def grouped(self) -> GroupedWeight:
        """The same for executors; only for whole numbers in regular groups."""
        codes, zero, middle = self.codes, self.zero, 1 << self.bits - 1
        if codes.dtype is torch.uint8 and zero is not None and bool((zero == middle).all()):
            codes, zero = (codes.to(torch.int16) - middle).to(torch.int8), None  # symmetric: no offsets to carry along
        offset = None if zero is None else -zero * self.scale
        return GroupedWeight(self.bits, self.group_size, codes, self.scale, offset)
