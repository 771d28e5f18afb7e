"""Quantizer `hqq`: half-quadratic quantization in 1, 2, 3, 4 or 8 bits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pluglm import hookimpl

if TYPE_CHECKING:
    from pluglm.contracts import Quantizer, QuantizerRequest


@hookimpl
def pluglm_build_quantizer(request: QuantizerRequest) -> Quantizer:
    """Build the quantizer; the package hqq is imported only to pack weights."""
    from pluglm_quantizer_hqq.quantizer import HqqQuantizer
    from pluglm_quantizer_hqq.settings import read

    return HqqQuantizer(read(request))
