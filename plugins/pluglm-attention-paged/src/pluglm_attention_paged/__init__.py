"""The entry point of the paged attention; imports torch only when it builds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pluglm import hookimpl

if TYPE_CHECKING:
    from pluglm.contracts import AttentionBackend, AttentionRequest


@hookimpl
def pluglm_build_attention(request: AttentionRequest) -> AttentionBackend:
    """Build the paged attention. Raises UnsupportedRequestError with every reason if it cannot honour `request`."""
    from pluglm_attention_paged.backend import PagedAttention

    return PagedAttention(request)
