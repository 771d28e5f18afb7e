"""The layout `quantized`: old cells in 8, 4 or 2 bits, recent ones in full precision.

Source: Liu et al. 2024, "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache", section 3.2; for the variant
`hqq`, Badri & Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models".
"""

from __future__ import annotations

from typing import Any

from pluglm.contracts import CacheRequest, CrossSlot, KVSlot
from pluglm_caches import hqq_backend
from pluglm_caches.affine import Fit, span
from pluglm_caches.blocks import Codec
from pluglm_caches.layout import Layout
from pluglm_caches.packing import WIDTHS
from pluglm_caches.quantized_store import QuantizedStore
from pluglm_caches.stores import Store
from pluglm_caches.windows import WindowStore


class Quantized(Layout):
    """Blocks of old cells, packed, and a tail of recent ones.

    Latents stay as they are: they are compressed already, and every head reads them. So do states and the encoder's
    keys. A window or chunk that reaches no further than the tail is kept as in `hybrid`, unpacked.

    Options: bits: of a number. group_size: cells of a block, which share a scale a channel of keys; and channels at
    most that share one in a value. residual: cells in full precision at least. slack: as in `hybrid`.
    Variants: None: a group's scale spans its least and greatest number. hqq: the package `hqq` moves its zero.
    """

    options = {"bits": (4, 2), "group_size": (32, 4), "residual": (128, 0), "slack": (64, 0)}  # noqa: RUF012 - ClassVar
    variants = ("hqq",)

    def __init__(self, name: str, request: CacheRequest) -> None:
        self.view = "quantized" if "quantized" in request.views else "dense"
        super().__init__(name, request)
        self._fit: Fit = hqq_backend.half_quadratic if request.variant == "hqq" else span

    def refusals(self) -> list[str]:
        """As in `Layout`; the encoder's keys are dense whatever the view."""
        reasons = super().refusals()
        crossed = any(isinstance(slot, CrossSlot) for slot in self.slots)
        if crossed and "dense" not in self.request.views:
            reasons.append("it keeps the encoder's keys dense, and the attention backend reads only packed blocks")
        if self.request.variant == "hqq" and (missing := hqq_backend.missing()):
            reasons.append(missing)
        return reasons

    def _misfit(self, name: str, value: Any) -> str:
        if reason := super()._misfit(name, value):
            return reason
        if name == "bits" and value not in WIDTHS:
            return f"its option bits is {', '.join(map(str, WIDTHS[:-1]))} or {WIDTHS[-1]}, not {value!r}"
        if name == "group_size" and value % 4:
            return f"its option group_size is a multiple of 4, which fills bytes at every width, not {value!r}"
        return ""

    def kv_store(self, slot: KVSlot, rows: int, capacity: int | None) -> Store:
        bits, group_size, residual, slack = (int(self.settings[name]) for name in self.options)
        reaches = [size for size in (slot.window, slot.chunk) if size is not None]
        if reaches and min(reaches) + slack <= residual:
            return WindowStore.of(slot, rows, self.dtype, self.device, slack=slack, hint=capacity)
        codec = Codec.of(slot, self.dtype, bits=bits, group_size=group_size, fit=self._fit)
        return QuantizedStore.of(
            slot, rows, codec, self.device, residual=residual, unpacked=self.view == "dense", slack=slack, hint=capacity
        )
