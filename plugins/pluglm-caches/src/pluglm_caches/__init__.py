"""Caches of keys, values and states; each layout is another choice of a store for each of the model's slots."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pluglm import hookimpl

if TYPE_CHECKING:
    from pluglm.contracts import CacheLayout, CacheRequest


class LayoutProvider:
    """What one entry point names: builds the layout of one name."""

    def __init__(self, name: str) -> None:
        self.name = name

    @hookimpl
    def pluglm_build_cache(self, request: CacheRequest) -> CacheLayout:
        """Check `request` against what the layout can do and return it."""
        from pluglm_caches.layouts import build  # imports torch

        return build(self.name, request)


dynamic = LayoutProvider("dynamic")
static = LayoutProvider("static")
hybrid = LayoutProvider("hybrid")
sliding = LayoutProvider("sliding")
chunked = LayoutProvider("chunked")
paged = LayoutProvider("paged")
quantized = LayoutProvider("quantized")
sink = LayoutProvider("sink")
offloaded = LayoutProvider("offloaded")
