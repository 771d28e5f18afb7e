"""The onednn quantizer keeps the contract of its kind, in both variants and by both int8 products."""

from __future__ import annotations

import json
from typing import Any

import pluglm_kernels_onednn

from pluglm.contracts import Quantizer, QuantizerRequest
from pluglm.testing.quantizer import QuantizerContract


class TestInt8(QuantizerContract):
    provider = pluglm_kernels_onednn
    rounds_inputs = True  # in float32 to bfloat16


class TestInt8OfManyRows(QuantizerContract):
    """Every input goes to oneDNN's product of integers, with packed weights kept."""

    provider = pluglm_kernels_onednn
    variant = "int8"
    rounds_inputs = True
    options = (("few_rows", 0), ("keep_packed", True))

    def build(self, dtype: str | None = None, **request: Any) -> Quantizer:
        return super().build(dtype, **{"options": self.options, **request})

    def reader(self, writer: Quantizer, dtype: str) -> Quantizer:
        config = json.loads(json.dumps(writer.config()))
        request = QuantizerRequest(device="cpu", dtype=dtype, config=config, options=self.options)
        return pluglm_kernels_onednn.pluglm_build_quantizer(request=request)


class TestBf16(QuantizerContract):
    provider = pluglm_kernels_onednn
    variant = "bf16"

    def dtypes(self) -> tuple[str, ...]:
        return ("bfloat16",)
