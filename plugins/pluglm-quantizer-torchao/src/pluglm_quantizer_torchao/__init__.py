"""Quantizer `torchao`: the weight types of the torchao library."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pluglm import hookimpl

if TYPE_CHECKING:
    from pluglm.contracts import Quantizer, QuantizerRequest


@hookimpl
def pluglm_build_quantizer(request: QuantizerRequest) -> Quantizer:
    """Build the quantizer; torchao is imported here and not before (two seconds)."""
    from pluglm_quantizer_torchao.quantizer import make

    return make(request)
