"""The layouts by name: what each adds to `Layout`."""

from __future__ import annotations

from pluglm.contracts import CacheRequest, KVSlot
from pluglm_caches.layout import EVERY_KIND, Layout
from pluglm_caches.offloaded_layout import Offloaded
from pluglm_caches.paged_layout import Paged
from pluglm_caches.quantized_layout import Quantized
from pluglm_caches.sink_layout import Sink
from pluglm_caches.stores import Store
from pluglm_caches.windows import WindowStore


class Dynamic(Layout):
    """Dense tensors that grow by half in place."""


class Static(Layout):
    """Dense tensors of a capacity given beforehand; addresses never change."""

    fixed = True


class Hybrid(Layout):
    """Layers with a window or chunks keep what these reach; the others keep everything.

    Options: slack: tokens that can always be taken back (speculative decoding): what is read after that is kept, too.
    """

    options = {"slack": (64, 0)}  # noqa: RUF012 - declared ClassVar in the base class

    def kv_store(self, slot: KVSlot, rows: int, capacity: int | None) -> Store:
        if slot.window is None and slot.chunk is None:
            return super().kv_store(slot, rows, capacity)
        slack = int(self.settings["slack"])
        return WindowStore.of(slot, rows, self.dtype, self.device, slack=slack, hint=capacity)


class Sliding(Hybrid):
    """`hybrid` for models whose every attention layer has a window: memory does not grow with the text."""

    kinds = ("cross", "shared", "state", "window")


class Chunked(Hybrid):
    """`hybrid` for models whose every attention layer has chunks: memory does not grow with the text."""

    kinds = ("chunk", "cross", "shared", "state")


LAYOUTS: dict[str, type[Layout]] = {
    "dynamic": Dynamic,
    "static": Static,
    "hybrid": Hybrid,
    "sliding": Sliding,
    "chunked": Chunked,
    "paged": Paged,
    "quantized": Quantized,
    "sink": Sink,
    "offloaded": Offloaded,
}


def build(name: str, request: CacheRequest) -> Layout:
    """The layout `name` for `request`. Raises UnsupportedRequestError with every reason."""
    return LAYOUTS[name](name, request)


assert all(set(layout.kinds) <= set(EVERY_KIND) for layout in LAYOUTS.values())
