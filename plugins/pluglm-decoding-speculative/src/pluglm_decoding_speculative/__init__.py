"""Speculative decoding: prompt lookup, a draft model, early exit. Importing this package does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pluglm import hookimpl

if TYPE_CHECKING:
    from pluglm.contracts import DecodingRequest, DecodingStrategy


class SpeculativeProvider:
    """What one entry point names: builds the strategy of one name."""

    def __init__(self, name: str) -> None:
        self.name = name

    @hookimpl
    def pluglm_build_decoding(self, request: DecodingRequest) -> DecodingStrategy:
        """Refuse unknown options and variants, load the assistant if one is named, and return the strategy."""
        from pluglm_decoding_speculative.strategies import build  # imports torch

        return build(self.name, request)


assisted = SpeculativeProvider("assisted")
early_exit = SpeculativeProvider("early-exit")
prompt_lookup = SpeculativeProvider("prompt-lookup")
