"""Beam search, beam sampling, diverse and constrained beam search. Importing this package does not import torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pluglm import hookimpl

if TYPE_CHECKING:
    from pluglm.contracts import DecodingRequest, DecodingStrategy


class BeamProvider:
    """What one entry point names: builds the strategy of one name."""

    def __init__(self, name: str) -> None:
        self.name = name

    @hookimpl
    def pluglm_build_decoding(self, request: DecodingRequest) -> DecodingStrategy:
        """Refuse options and variants, of which there are none, and return the strategy."""
        from pluglm_decoding_beam.strategies import build  # imports torch

        return build(self.name, request)


beam = BeamProvider("beam")
beam_sampling = BeamProvider("beam-sampling")
diverse_beam = BeamProvider("diverse-beam")
constrained_beam = BeamProvider("constrained-beam")
