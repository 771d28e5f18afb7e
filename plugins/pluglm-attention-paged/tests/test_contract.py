"""Both variants keep the contract of their kind; without a variant it is one of them."""

from __future__ import annotations

import pluglm_attention_paged
import pytest
from pluglm_attention_paged import native

from pluglm.contracts import AttentionSpec
from pluglm.testing.attention import AttentionContract


class TestTorch(AttentionContract):
    provider = pluglm_attention_paged

    def build(self, *specs: AttentionSpec, **request):
        return super().build(*specs, **{"variant": "torch", **request})


@pytest.mark.skipif(native.library() is None, reason="this installation has no compiled library")
class TestNative(AttentionContract):
    provider = pluglm_attention_paged

    def facts(self):
        return {**super().facts(), "requires": {"dtypes": list(native.DTYPES)}}

    def build(self, *specs: AttentionSpec, **request):
        return super().build(*specs, **{"variant": "native", **request})
