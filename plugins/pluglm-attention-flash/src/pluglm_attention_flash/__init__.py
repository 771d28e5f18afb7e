"""The entry point of FlashAttention; imports torch and the kernels only when it builds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pluglm import hookimpl

if TYPE_CHECKING:
    from pluglm.contracts import AttentionBackend, AttentionRequest


@hookimpl
def pluglm_build_attention(request: AttentionRequest) -> AttentionBackend:
    """Build the variant that is asked for, or the best one. Raises UnsupportedRequestError with every reason."""
    from pluglm_attention_flash.flash import build
    from pluglm_attention_flash.kernels import FINDERS

    return build(request, FINDERS)
