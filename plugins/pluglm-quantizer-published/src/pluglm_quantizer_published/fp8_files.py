"""Fine-grained fp8, as DeepSeek-V3 and Qwen3 publish it: float8 weights, a scale for each block of 128 by 128.

AutoFP8 writes the same quant_method with one scale for a weight, a stored one for inputs, and other names.

The products of these models are of float8 with float8: a layer's input is rounded too, with a scale for each token and
each 128 columns. That is done here as well, since a model without it is another one.

Source: DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", section 3.3; its inference/kernel.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pluglm_quantizer_published.form import FLOATS, Fields, Form, as_scale
from pluglm_quantizer_published.reader import Reader
from pluglm_quantizer_published.rounding import Rounding
from pluglm_quantizer_published.scaled import ScaledWeight
from pluglm_quantizer_published.settings import Settings

FLOAT8 = torch.float8_e4m3fn
IGNORED = ("quant_method", "modules_to_not_convert", "ignored_layers", "dequantize", "expert_dtype")


@dataclass(frozen=True)
class BlockForm(Form):
    """weight, and weight_scale_inv, which multiplies it for all its name. block: (rows, columns); None: the whole."""

    block: tuple[int, int] | None = (128, 128)

    required = ("weight", "weight_scale_inv")
    input_names = ("activation_scale", "")

    def names(self) -> tuple[str, ...]:
        """A static scale of the input is stored too."""
        static = self.rounding is not None and self.rounding.static
        return (*self.required, self.input_names[0]) if static else self.required

    def sizes(self, tensors: Mapping[str, Tensor]) -> tuple[int, int]:
        """weight is [out, in]."""
        out_features, in_features = tensors["weight"].shape
        return in_features, out_features

    def fields(self, in_features: int, out_features: int) -> Fields:
        """weight, weight_scale_inv [out / rows, in / columns] rounded up, activation_scale [], bias [out]."""
        scales: tuple[int, ...] = ()
        if self.block is not None:
            scales = (-(-out_features // self.block[0]), -(-in_features // self.block[1]))
        return {
            "weight": ((FLOAT8,), (out_features, in_features)),
            self.required[1]: ((*FLOATS, torch.float8_e8m0fnu, torch.uint8), scales),
            self.input_names[0]: (FLOATS, ()), "bias": (FLOATS, (out_features,)),
        }  # fmt: skip

    def scaled(self, tensors: Mapping[str, Tensor], in_features: int, *, regular: bool) -> ScaledWeight:
        """A block's scale is that of each of its rows."""
        weight, scale = tensors["weight"], as_scale(tensors[self.required[1]])
        out_features = weight.shape[0]
        if self.block is None:
            return ScaledWeight(weight, 8, scale.expand(out_features, 1), None, in_features)
        rows = scale.repeat_interleave(self.block[0], dim=0)[:out_features]
        return ScaledWeight(weight, 8, rows, None, self.block[1])

    def is_regular(self, tensors: Mapping[str, Tensor]) -> bool:
        """Never: float8 is no whole number."""
        return False


@dataclass(frozen=True)
class TensorForm(BlockForm):
    """AutoFP8's names for one scale of the weight and a stored one of the input."""

    required = ("weight", "weight_scale")
    input_names = ("input_scale", "")


class Fp8Reader(Reader):
    """quant_method "fp8"."""

    name = "fp8"

    def __init__(self, config: Mapping[str, Any], dtype: torch.dtype) -> None:
        super().__init__(config, dtype)
        settings = Settings(config)
        settings.one_of("fmt", ("e4m3",), "e4m3")
        settings.empty("modules_to_convert", "tables of embeddings are not read packed.")
        powers = settings.one_of("scale_fmt", ("float", "ue8m0"), "float") == "ue8m0"
        scheme = settings.one_of("activation_scheme", ("dynamic", "static"), "dynamic")
        block = _block(settings, config)
        settings.done(IGNORED)
        auto = scheme == "static" and "weight_block_size" not in config
        block = None if auto else block
        if scheme == "static" and block is not None:
            raise settings.refused("activation_scheme", "it is 'static', with blocks", "one scale fits no blocks.")
        rounding = Rounding(None, group_size=block and block[1], static=scheme == "static", powers=powers)
        self._form = (TensorForm if auto else BlockForm)(rounding, block=block)
        self.bits = 8 + 32 / (block[0] * block[1]) if block else 8.0

    def form(self, place: str) -> Form | None:
        """One for all. Which layers stay plain (modules_to_not_convert) shows in the file."""
        return self._form


def _block(settings: Settings, config: Mapping[str, Any]) -> tuple[int, int] | None:
    """weight_block_size: [rows, columns]; null: one scale for all; not there: 128 by 128."""
    block = settings.take("weight_block_size", list, [128, 128])
    if "weight_block_size" in config and config["weight_block_size"] is None:
        return None
    if block is None or len(block) != 2 or not all(type(n) is int and n > 0 for n in block):
        raise settings.refused("weight_block_size", f"it is {block!r}", "expected two numbers above zero.")
    return block[0], block[1]
