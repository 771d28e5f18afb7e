"""Quantizers that read what others have published packed: `gptq`, `awq`, `compressed-tensors`, `fp8`, `mxfp4`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pluglm import hookimpl

if TYPE_CHECKING:
    from pluglm.contracts import Quantizer, QuantizerRequest


class ReaderProvider:
    """What one entry point names: builds the reader of one quant_method."""

    def __init__(self, name: str) -> None:
        self.name = name

    @hookimpl
    def pluglm_build_quantizer(self, request: QuantizerRequest) -> Quantizer:
        """Check the checkpoint's quantization_config and return its reader."""
        from pluglm_quantizer_published.readers import build  # imports torch

        return build(self.name, request)


gptq = ReaderProvider("gptq")
awq = ReaderProvider("awq")
compressed_tensors = ReaderProvider("compressed-tensors")
fp8 = ReaderProvider("fp8")
mxfp4 = ReaderProvider("mxfp4")
