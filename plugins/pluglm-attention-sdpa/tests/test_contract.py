"""The sdpa attention keeps the contract of its kind."""

import pluglm_attention_sdpa

from pluglm.testing.attention import AttentionContract


class TestSdpa(AttentionContract):
    provider = pluglm_attention_sdpa
