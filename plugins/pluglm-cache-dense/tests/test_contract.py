"""Both layouts under the conformance kit."""

import pluglm_cache_dense

from pluglm.testing.cache import CacheContract, provider_facts


class TestDynamic(CacheContract):
    provider = pluglm_cache_dense.dynamic
    facts = provider_facts("pluglm_cache_dense", "cache", "dynamic")


class TestStatic(CacheContract):
    provider = pluglm_cache_dense.static
    facts = provider_facts("pluglm_cache_dense", "cache", "static")
