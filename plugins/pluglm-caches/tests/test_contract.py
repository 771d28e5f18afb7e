"""Every layout under the conformance kit."""

import pluglm_caches

from pluglm.contracts import KVSlot, Rope
from pluglm.testing.cache import CacheContract, provider_facts


class TestDynamic(CacheContract):
    provider = pluglm_caches.dynamic
    facts = provider_facts("pluglm_caches", "cache", "dynamic")


class TestStatic(CacheContract):
    provider = pluglm_caches.static
    facts = provider_facts("pluglm_caches", "cache", "static")
    max_examples = 15


class TestHybrid(CacheContract):
    provider = pluglm_caches.hybrid
    facts = provider_facts("pluglm_caches", "cache", "hybrid")
    max_examples = 15
    bounded = True


class TestSliding(CacheContract):
    provider = pluglm_caches.sliding
    facts = provider_facts("pluglm_caches", "cache", "sliding")
    max_examples = 15
    bounded = True


class TestChunked(CacheContract):
    provider = pluglm_caches.chunked
    facts = provider_facts("pluglm_caches", "cache", "chunked")
    max_examples = 15
    bounded = True


class TestSink(CacheContract):
    """With a window that holds the kit's texts; what is evicted from longer ones, test_sinks.py tells."""

    provider = pluglm_caches.sink
    facts = provider_facts("pluglm_caches", "cache", "sink")
    bounded = True
    max_examples = 15

    def build(self, slots, **request):
        rope = Rope("default", 100.0, 8)
        request.setdefault("rotations", tuple(rope if isinstance(slot, KVSlot) else None for slot in slots))
        request["options"] = (("window", 256), *request.get("options", ()))
        return super().build(slots, **request)


class TestQuantized(CacheContract):
    """With its defaults; texts that are packed again and again, and tighter bounds, are in test_quantized.py."""

    provider = pluglm_caches.quantized
    facts = provider_facts("pluglm_caches", "cache", "quantized")
    bounded = True
    max_examples = 6


class TestOffloaded(CacheContract):
    provider = pluglm_caches.offloaded
    facts = provider_facts("pluglm_caches", "cache", "offloaded")
    max_examples = 15
