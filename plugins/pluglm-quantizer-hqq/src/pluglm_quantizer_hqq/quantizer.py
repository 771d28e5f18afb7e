"""The quantizer that the core calls: which layers are packed, and what a file holds of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pluglm_quantizer_hqq import codes, layer
from pluglm_quantizer_hqq.settings import Settings


class HqqQuantizer:
    """See `pluglm.contracts.PublishedQuantizer`."""

    name = "hqq"

    def __init__(self, settings: Settings) -> None:
        self._settings, self._dtype = settings, getattr(torch, settings.dtype)
        self._sizes: dict[str, tuple[int, int]] = {}  # (out, in) of the layers that were asked about
        grid = settings.grid
        #: Of the layer that was last packed or read; before that, what the settings promise.
        self.bits = 8 * codes.storage(grid.bits).itemsize / codes.PER[grid.bits]
        self.bits += 16 * self._dtype.itemsize / grid.group_size if grid.group_size else 0

    def refusal(self, name: str, in_features: int, out_features: int) -> str | None:
        """The head stays as it is, as in the files of others; whether a file kept it so shows in the file."""
        self._sizes[name] = (out_features, in_features)
        if self._settings.published:
            return None
        if name == "head":
            return "the head stays in full precision"
        grid = self._settings.of(name)
        size, total = grid.size(out_features, in_features), out_features * in_features
        if grid.axis == 1 and in_features % size:
            return f"{in_features} columns are not made of groups of {size}"
        if total % size:
            return f"{out_features} x {in_features} weights are not made of groups of {size}"
        rows, per = (total // size if grid.axis == 1 else size), codes.PER[grid.bits]
        if grid.bits != 3 and rows % per:
            return f"{rows} rows of codes do not fill bytes of {per} codes"
        return None

    def quantize(self, name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """weight: [out, in]; bias: [out] or None."""
        from pluglm_quantizer_hqq.rounding import half_quadratic

        grid, size = self._settings.of(name), (weight.shape[0], weight.shape[1])
        whole, scale, zero = half_quadratic(weight, grid)
        own = dataclasses.replace(grid, group_size=grid.size(*size))
        made = layer.make(
            codes.pack(whole, grid.bits), scale.to(self._dtype), zero.to(self._dtype), bias, own, size
        )  # fmt: skip
        self.bits = made.bits
        return made

    def pack(self, module: nn.Module) -> dict[str, Tensor]:
        """The tensors that hqq itself writes, and the bias where there is one."""
        assert isinstance(module, layer.HqqLinear)
        return layer.write(module)

    def tensor_names(self, name: str) -> tuple[str, ...]:
        """Names of `pack` for one layer without a bias; `stored_names` tells of files."""
        del name
        return (*layer.NEEDED, *layer.BESIDE)

    def stored_names(self, name: str, place: str, present: frozenset[str]) -> tuple[str, ...]:
        """What the file holds of a layer; () if its weight is plain there, as that of a skipped one is."""
        del name, place
        if "weight" in present and "W_q" not in present:
            return ()
        return (*layer.NEEDED, *(short for short in (*layer.BESIDE, "bias") if short in present))

    def unpack(self, name: str, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The layer that `pack` was given, or that hqq wrote."""
        made = layer.read(name, tensors, self._dtype, self._sizes.get(name))
        self.bits = made.bits
        return made

    def config(self) -> dict[str, Any]:
        """Written beside packed weights."""
        return self._settings.config()
