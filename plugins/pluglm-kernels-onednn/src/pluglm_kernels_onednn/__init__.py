"""Quantizer `onednn`: linear layers by oneDNN's products, chosen by the number of rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pluglm import hookimpl

if TYPE_CHECKING:
    from pluglm.contracts import Quantizer, QuantizerRequest


@hookimpl
def pluglm_build_quantizer(request: QuantizerRequest) -> Quantizer:
    """Build the quantizer of a variant. Raises UnsupportedRequestError with every reason."""
    from pluglm_kernels_onednn.quantizer import build  # imports torch

    return build(request)
