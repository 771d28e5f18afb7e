"""The cache of an encoder-decoder under the reference's name: two caches there, one here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pluglm.errors import CacheError, InputError
from pluglm_hf.caches import DynamicCache, HFCache, Pairs

if TYPE_CHECKING:
    from pluglm.contracts.cache import CacheLayout
    from pluglm_hf.layouts import Layouts


class EncoderDecoderCache(HFCache):
    """What an encoder-decoder keeps: one cache of pluglm holds the decoder's cells and the encoder's keys.

    Args:
        self_attention_cache: says which layout. cross_attention_cache: an empty one; the encoder's keys are kept as
            they are.
    """

    def __init__(self, self_attention_cache: Any = None, cross_attention_cache: Any = None) -> None:
        super().__init__()
        kept = self_attention_cache if self_attention_cache is not None else DynamicCache()
        if not isinstance(kept, HFCache) or kept.get_seq_length():
            raise InputError("an EncoderDecoderCache is made of empty caches.", fix="Pass DynamicCache(), or nothing.",
                             argument="self_attention_cache")  # fmt: skip
        if cross_attention_cache is not None and cross_attention_cache.get_seq_length():
            raise InputError("the cache of the encoder's keys must be empty.", fix="Pass DynamicCache(), or nothing.",
                             argument="cross_attention_cache")  # fmt: skip
        self.self_attention_cache = kept

    def layout(self, layouts: Layouts) -> CacheLayout:
        """That of the decoder's cache."""
        return self.self_attention_cache.layout(layouts)

    def capacity(self, needed: int | None) -> int | None:
        """That of the decoder's cache."""
        return self.self_attention_cache.capacity(needed)

    @property
    def is_updated(self) -> dict[int, bool]:
        """For each layer: are the encoder's keys there?"""
        if self.inner is None:
            return {}
        crossed = [i for i, slot in enumerate(self.inner.slots) if slot.kind == "cross"]
        return {layer: self.inner.cross(slot) is not None for layer, slot in enumerate(crossed)}

    def to_legacy_cache(self) -> Pairs:
        """Refused: the older form has four tensors a layer, and says nothing of padding."""
        raise CacheError("an encoder-decoder's cache has no older form here.", fix="Keep the cache itself.",
                         layout=None, operation="to_legacy_cache")  # fmt: skip
