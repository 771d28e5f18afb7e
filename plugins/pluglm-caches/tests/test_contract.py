"""Both layouts under the conformance kit."""

import pluglm_caches

from pluglm.testing.cache import CacheContract, provider_facts


class TestDynamic(CacheContract):
    provider = pluglm_caches.dynamic
    facts = provider_facts("pluglm_caches", "cache", "dynamic")


class TestStatic(CacheContract):
    provider = pluglm_caches.static
    facts = provider_facts("pluglm_caches", "cache", "static")
