"""The model types of this package."""

from __future__ import annotations

from pluglm_blocks.reading import Family

from pluglm_arch_bloom.bloom import bloom
from pluglm_arch_bloom.mpt import mpt
from pluglm_arch_bloom.weights import bloom_weights, mpt_weights

FAMILIES: dict[str, Family] = {
    "bloom": Family(bloom, bloom_weights, bos=1, eos=2),
    "mpt": Family(mpt, mpt_weights),
}
