"""All strategies against the conformance kit."""

from __future__ import annotations

import pluglm_decoding_beam
import pytest

from pluglm.testing.decoding import DecodingContract


class BeamContract(DecodingContract):
    @pytest.mark.xfail(
        raises=AssertionError, strict=True, reason="a search tells a streamer nothing before it ends, so no first token"
    )
    def test_scores_that_are_no_numbers_give_an_error_and_no_token(self) -> None:
        super().test_scores_that_are_no_numbers_give_an_error_and_no_token()


class TestBeam(BeamContract):
    provider = pluglm_decoding_beam.beam


class TestBeamSampling(BeamContract):
    provider = pluglm_decoding_beam.beam_sampling


class TestDiverseBeam(BeamContract):
    provider = pluglm_decoding_beam.diverse_beam
