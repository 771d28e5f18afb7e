"""Both strategies against the conformance kit."""

from __future__ import annotations

import pluglm_decoding_standard

from pluglm.testing.decoding import DecodingContract


class TestGreedy(DecodingContract):
    provider = pluglm_decoding_standard.greedy


class TestSampling(DecodingContract):
    provider = pluglm_decoding_standard.sampling
