"""The quantizer that the core calls: which layers are packed, and what a file holds of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pluglm_quantizer_bitsandbytes import four_bit, int8
from pluglm_quantizer_bitsandbytes.settings import Settings


class BitsAndBytesQuantizer:
    """See `pluglm.contracts.PublishedQuantizer`."""

    name = "bitsandbytes"

    def __init__(self, settings: Settings) -> None:
        self._settings, self.bits = settings, _bits(settings, settings.block_size)
        self._sizes: dict[str, tuple[int, int]] = {}  # (out, in) of the layers that were asked about

    def refusal(self, name: str, in_features: int, out_features: int) -> str | None:
        """The head stays as it is, as in the files of others; whether a file kept it so shows in the file."""
        self._sizes[name] = (out_features, in_features)
        if self._settings.published:
            return None
        if name == "head":
            return "the head stays in full precision"
        if self._settings.kind != "int8" and in_features % 2:
            return f"{in_features} columns do not fill whole bytes of 4-bit codes"
        return None

    def quantize(self, name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """weight: [out, in]; bias: [out] or None."""
        del name
        if self._settings.kind == "int8":
            return int8.quantize(weight, bias, self._settings.threshold)
        return four_bit.quantize(weight, bias, self._settings)

    def pack(self, module: nn.Module) -> dict[str, Tensor]:
        """The tensors that bitsandbytes itself writes, and the bias where there is one."""
        if isinstance(module, int8.Int8Linear):
            return int8.pack(module)
        assert isinstance(module, four_bit.FourBitLinear)
        return four_bit.pack(module)

    def tensor_names(self, name: str) -> tuple[str, ...]:
        """Names of `pack` for one layer without a bias; `stored_names` tells of files."""
        del name
        if self._settings.kind == "int8":
            return int8.NAMES
        return four_bit.tensor_names(self._settings.kind, self._settings.double_quant)

    def stored_names(self, name: str, place: str, present: frozenset[str]) -> tuple[str, ...]:
        """What the file holds of a layer; () if its weight is plain there, as that of a skipped one is."""
        del place
        names = self.tensor_names(name)
        if "weight" in present and not present & set(names[1:]):
            return ()
        return (*names, "bias") if "bias" in present else names

    def unpack(self, name: str, tensors: Mapping[str, Tensor]) -> nn.Module:
        """The layer that `pack` was given."""
        size = self._sizes.get(name)
        if self._settings.kind == "int8":
            return int8.unpack(name, tensors, self._settings, size)
        layer = four_bit.unpack(name, tensors, self._settings, size)
        self.bits = _bits(self._settings, layer.block_size)  # a config does not say it
        return layer

    def config(self) -> dict[str, Any]:
        """Written beside packed weights; Transformers reads it too."""
        return self._settings.config()


def _bits(settings: Settings, block_size: int) -> float:
    """Of a weight: 8, 4.5, or 4.13 with double quantization; the last two in blocks of 64."""
    if settings.kind == "int8":
        return 8.0
    return 4 + (8 + 32 / four_bit.NESTED_BLOCK if settings.double_quant else 32) / block_size
