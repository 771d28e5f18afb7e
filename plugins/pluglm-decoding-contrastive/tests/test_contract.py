"""Both strategies against the conformance kit."""

from __future__ import annotations

import pluglm_decoding_contrastive

from pluglm.testing.decoding import DecodingContract


class TestContrastiveSearch(DecodingContract):
    provider = pluglm_decoding_contrastive.contrastive_search


class TestDoLa(DecodingContract):
    provider = pluglm_decoding_contrastive.dola
