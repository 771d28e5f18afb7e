"""Contrastive search and DoLa. Importing this package does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pluglm import hookimpl

if TYPE_CHECKING:
    from pluglm.contracts import DecodingRequest, DecodingStrategy


class ContrastiveProvider:
    """What one entry point names: builds the strategy of one name."""

    def __init__(self, name: str) -> None:
        self.name = name

    @hookimpl
    def pluglm_build_decoding(self, request: DecodingRequest) -> DecodingStrategy:
        """Refuse options and variants, of which there are none, and return the strategy."""
        from pluglm_decoding_contrastive.strategies import build  # imports torch

        return build(self.name, request)


contrastive_search = ContrastiveProvider("contrastive-search")
dola = ContrastiveProvider("dola")
