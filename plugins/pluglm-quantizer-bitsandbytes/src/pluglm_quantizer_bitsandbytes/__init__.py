"""Quantizer `bitsandbytes`: LLM.int8, NF4 and FP4 by the library of that name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pluglm import hookimpl

if TYPE_CHECKING:
    from pluglm.contracts import Quantizer, QuantizerRequest


@hookimpl
def pluglm_build_quantizer(request: QuantizerRequest) -> Quantizer:
    """Build the quantizer; bitsandbytes is imported here and not before (it imports torch's compiler)."""
    from pluglm_quantizer_bitsandbytes.library import load
    from pluglm_quantizer_bitsandbytes.quantizer import BitsAndBytesQuantizer
    from pluglm_quantizer_bitsandbytes.settings import read

    settings = read(request)
    load(settings.kind, request.device)
    return BitsAndBytesQuantizer(settings)
