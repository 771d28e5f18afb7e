"""How compressed-tensors stores a weight: packed into words, or as int8 or float8 under the name `weight`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pluglm_quantizer_published.bit_stream import WORD, unpack, words_for
from pluglm_quantizer_published.form import FLOATS, Fields, Form
from pluglm_quantizer_published.scaled import ScaledWeight


@dataclass(frozen=True)
class Spread:
    """Over what a scale reaches.

    Attributes:
        kind: "tensor", "channel" (a row), "group" (columns of a row) or "block". rows, columns: of a block or group.
    """

    kind: str
    rows: int = 1
    columns: int = 0

    def shape(self, in_features: int, out_features: int) -> tuple[int, ...]:
        """The shape of the scales. Raises ValueError where groups do not fit."""
        if self.kind == "tensor":
            return (1,)
        if self.kind == "channel":
            return out_features, 1
        if self.kind == "group" and in_features % self.columns:
            raise ValueError(f"{in_features} columns are not made of groups of {self.columns}")
        return -(-out_features // self.rows), -(-in_features // self.columns)

    def by_row(self, values: Tensor, out_features: int) -> Tensor:
        """[out, groups] float32."""
        values = values.float()
        if self.kind == "tensor":
            return values.expand(out_features, 1)
        return values.repeat_interleave(self.rows, dim=0)[:out_features] if self.kind == "block" else values

    def size(self, in_features: int) -> int:
        """Columns of a group."""
        return self.columns or in_features


@dataclass(frozen=True)
class SchemeForm(Form):
    """What both ways have in common. ordered: each column's group is stored (weight_g_idx)."""

    spread: Spread = Spread("tensor")
    bits: int = 8
    symmetric: bool = True
    ordered: bool = False

    def names(self) -> tuple[str, ...]:
        """Zero points, the columns' groups and the input's scale where the scheme has them."""
        more = [] if self.symmetric else ["weight_zero_point"]
        more += ["weight_g_idx"] if self.ordered else []
        if self.rounding is not None and self.rounding.static:
            more += ["input_scale"] if self.rounding.symmetric else ["input_scale", "input_zero_point"]
        return (*self.required, *more)

    def fields(self, in_features: int, out_features: int) -> Fields:
        """weight_scale as the strategy says, weight_g_idx [in], input_scale and input_zero_point [1], bias [out]."""
        return {
            "weight_scale": (FLOATS, self.spread.shape(in_features, out_features)),
            "weight_g_idx": ((torch.int32, torch.int64), (in_features,)),
            "input_scale": (FLOATS, (1,)), "input_zero_point": ((torch.int8,), (1,)), "bias": (FLOATS, (out_features,)),
        }  # fmt: skip

    def bits_each(self) -> float:
        """Bits of a weight and its share of scales and zero points."""
        share = 16 + (0 if self.symmetric else self.bits)
        return self.bits + (share / self.spread.columns / self.spread.rows if self.spread.columns else 0.0)

    def is_regular(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whole numbers in groups of one size that stand side by side."""
        in_features, _ = self.sizes(tensors)
        return tensors[self.names()[0]].dtype in (torch.int8, torch.int32) and (
            in_features % self.spread.size(in_features) == 0
            and ("weight_g_idx" not in tensors or self._in_order(tensors["weight_g_idx"], in_features))
        )

    def check_values(self, tensors: Mapping[str, Tensor]) -> str | None:
        """weight_g_idx must point at groups that exist."""
        if "weight_g_idx" not in tensors or self._is_unset(tensors["weight_g_idx"]):
            return None
        index, groups = tensors["weight_g_idx"], tensors["weight_scale"].shape[1]
        low, high = int(index.min()), int(index.max())
        return (
            f"weight_g_idx has groups from {low} to {high}, there are {groups}" if low < 0 or high >= groups else None
        )

    def index(self, tensors: Mapping[str, Tensor], *, regular: bool) -> Tensor | None:
        """[in] int64, or None where the columns are in their own order."""
        return None if regular or "weight_g_idx" not in tensors else tensors["weight_g_idx"].long()

    def _in_order(self, index: Tensor, in_features: int) -> bool:
        own = torch.arange(in_features, device=index.device) // self.spread.size(in_features)
        return self._is_unset(index) or torch.equal(index.long(), own)

    @staticmethod
    def _is_unset(index: Tensor) -> bool:
        return bool((index == -1).all())  # how the library says that columns were left in their order


@dataclass(frozen=True)
class PackedForm(SchemeForm):
    """pack-quantized: codes with 2^(bits-1) added, packed along the columns; zero points likewise, along the rows."""

    required = ("weight_packed", "weight_scale", "weight_shape")
    optional = ("weight_g_idx", "bias")

    def sizes(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """weight_shape holds (out, in): the words alone do not tell the last columns from filling."""
        shape = tensors["weight_shape"].flatten().tolist()
        return (int(shape[1]), int(shape[0])) if len(shape) == 2 else (0, 0)

    def fields(self, in_features: int, out_features: int) -> Fields:
        """weight_packed [out, words], weight_zero_point [words, groups], weight_shape [2] and what all schemes have."""
        common = super().fields(in_features, out_features)
        if in_features < 1 or out_features < 1:
            raise ValueError("weight_shape does not hold two sizes")
        if WORD % self.bits and in_features % WORD:  # elsewhere earlier versions of the library packed differently
            raise ValueError(f"{in_features} columns of {self.bits} bits do not fill runs of {WORD} codes")
        groups = self.spread.shape(in_features, out_features)[-1]
        zeros = words_for(out_features, self.bits), groups
        if not self.symmetric and WORD % self.bits and out_features % WORD:
            raise ValueError(f"zero points of {out_features} rows of {self.bits} bits do not fill runs of {WORD} codes")
        return {
            **common,
            "weight_packed": ((torch.int32,), (out_features, words_for(in_features, self.bits))),
            "weight_zero_point": ((torch.int32,), zeros), "weight_shape": ((torch.int32, torch.int64), (2,)),
        }  # fmt: skip

    def scaled(self, tensors: Mapping[str, Tensor], in_features: int, *, regular: bool) -> ScaledWeight:
        """Codes stay as they are packed; what was added to them is a zero point."""
        out_features = tensors["weight_packed"].shape[0]
        codes = unpack(tensors["weight_packed"], self.bits, in_features)
        scale = self.spread.by_row(tensors["weight_scale"], out_features)
        if self.symmetric:
            zero = torch.full_like(scale, 1 << self.bits - 1)
        else:
            zero = unpack(tensors["weight_zero_point"].T, self.bits, out_features).T.float()
        size, index = self.spread.size(in_features), self.index(tensors, regular=regular)
        return ScaledWeight(codes, self.bits, scale, zero, size, index)


@dataclass(frozen=True)
class PlainForm(SchemeForm):
    """int-quantized, float-quantized, naive-quantized: `weight` in int8 or float8, one code a byte."""

    is_float: bool = False

    required = ("weight", "weight_scale")

    def sizes(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """weight is [out, in]."""
        out_features, in_features = tensors["weight"].shape
        return in_features, out_features

    def fields(self, in_features: int, out_features: int) -> Fields:
        """weight, weight_zero_point like its scale, and what all schemes have."""
        common = super().fields(in_features, out_features)
        dtype = torch.float8_e4m3fn if self.is_float else torch.int8
        return {
            **common, "weight": ((dtype,), (out_features, in_features)),
            "weight_zero_point": ((torch.int8,), self.spread.shape(in_features, out_features)),
        }  # fmt: skip

    def scaled(self, tensors: Mapping[str, Tensor], in_features: int, *, regular: bool) -> ScaledWeight:
        """Codes as they are."""
        weight = tensors["weight"]
        out_features = weight.shape[0]
        scale = self.spread.by_row(tensors["weight_scale"], out_features)
        zero = None if self.symmetric else self.spread.by_row(tensors["weight_zero_point"], out_features)
        size, index = self.spread.size(in_features), self.index(tensors, regular=regular)
        return ScaledWeight(weight, self.bits, scale, zero, size, index)
