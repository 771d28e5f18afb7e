"""The reference attention keeps the contract of its kind."""

import pluglm_attention_eager

from pluglm.testing.attention import AttentionContract


class TestEager(AttentionContract):
    provider = pluglm_attention_eager
