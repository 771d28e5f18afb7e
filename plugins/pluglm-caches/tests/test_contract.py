"""Every layout under the conformance kit."""

import pluglm_caches

from pluglm.testing.cache import CacheContract, provider_facts


class TestDynamic(CacheContract):
    provider = pluglm_caches.dynamic
    facts = provider_facts("pluglm_caches", "cache", "dynamic")


class TestStatic(CacheContract):
    provider = pluglm_caches.static
    facts = provider_facts("pluglm_caches", "cache", "static")


class TestHybrid(CacheContract):
    provider = pluglm_caches.hybrid
    facts = provider_facts("pluglm_caches", "cache", "hybrid")
    bounded = True


class TestSliding(CacheContract):
    provider = pluglm_caches.sliding
    facts = provider_facts("pluglm_caches", "cache", "sliding")
    bounded = True


class TestChunked(CacheContract):
    provider = pluglm_caches.chunked
    facts = provider_facts("pluglm_caches", "cache", "chunked")
    bounded = True
