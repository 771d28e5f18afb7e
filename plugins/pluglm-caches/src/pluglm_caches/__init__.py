"""Dense key-value caches: `dynamic` grows geometrically in place, `static` has its storage from the start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pluglm import hookimpl

if TYPE_CHECKING:
    from pluglm.contracts import CacheLayout, CacheRequest


class DenseProvider:
    """What one entry point names: builds the layout of one name."""

    def __init__(self, name: str) -> None:
        self.name = name

    @hookimpl
    def pluglm_build_cache(self, request: CacheRequest) -> CacheLayout:
        """Check `request` against what a dense layout can do and return the layout."""
        from pluglm_caches.layout import build  # imports torch

        return build(self.name, request)


dynamic = DenseProvider("dynamic")
static = DenseProvider("static")
