"""All strategies against the conformance kit."""

from __future__ import annotations

import pluglm_decoding_beam

from pluglm.testing.decoding import DecodingContract


class BeamContract(DecodingContract):
    tells_each_token = False  # no first token is certain while hypotheses differ in it


class TestBeam(BeamContract):
    provider = pluglm_decoding_beam.beam


class TestBeamSampling(BeamContract):
    provider = pluglm_decoding_beam.beam_sampling


class TestDiverseBeam(BeamContract):
    provider = pluglm_decoding_beam.diverse_beam


class TestConstrainedBeam(BeamContract):
    provider = pluglm_decoding_beam.constrained_beam
