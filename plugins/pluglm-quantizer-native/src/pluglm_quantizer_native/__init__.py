"""Quantizer `native`: weights of 8 or 4 bits in groups of 32, in the layout that native kernels read."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pluglm import hookimpl

if TYPE_CHECKING:
    from pluglm.contracts import Quantizer, QuantizerRequest


@hookimpl
def pluglm_build_quantizer(request: QuantizerRequest) -> Quantizer:
    """Build the quantizer from what the user asks for, or from what a packed checkpoint says of itself."""
    from pluglm_quantizer_native.quantizer import NativeQuantizer
    from pluglm_quantizer_native.settings import read

    return NativeQuantizer(read(request), request.device, request.dtype)
