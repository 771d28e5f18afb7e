"""Caches that are made before a model is known: where they settle, what they hold, and what they refuse."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pluglm_hf as hf
import pytest
import torch

from pluglm.errors import CacheError, ContextLengthError, InputError, PluglmError

IDS = torch.tensor([[0, 5, 70, 71, 9]])
MORE = torch.tensor([[0, 5, 70, 71, 9, 33, 21, 8]])


@pytest.fixture(scope="module")
def expected(llama: Any) -> Any:
    return llama.generate(MORE, max_new_tokens=6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: hf.DynamicCache(), lambda: hf.DynamicCache(offloading=True), lambda: hf.StaticCache(max_cache_len=30),
        lambda: hf.QuantizedCache("quanto", nbits=4, residual_length=64),
        lambda: hf.QuantizedCache(cache_config={"backend": "quanto", "nbits": 8, "q_group_size": 32}),
    ],
)  # fmt: skip
def test_a_cache_made_before_the_model_changes_nothing(llama: Any, expected: Any, make: Callable[[], Any]) -> None:
    cache = make()
    assert cache.get_seq_length() == 0 and not cache.is_initialized
    llama(IDS, past_key_values=cache)
    assert cache.get_seq_length() == 5 and cache.is_initialized
    assert llama.generate(MORE, past_key_values=cache, max_new_tokens=6).tolist() == expected.tolist()
    assert cache.get_seq_length() == MORE.shape[1] + 5  # the last token is never fed


@pytest.mark.parametrize(
    ("implementation", "config", "layout"),
    [
        ("dynamic", None, "dynamic"), ("static", None, "static"), ("offloaded", None, "offloaded"), ("hybrid", None, "hybrid"),
        ("quantized", {"nbits": 4, "residual_length": 64}, "quantized"), ("quantized", None, "quantized"),
        ("quantized", {"nbits": 2, "residual_length": 0, "q_group_size": 4}, "quantized"),
        ("sink", {"window": 60}, "sink"),
    ],
)  # fmt: skip
def test_an_implementation_is_a_layout_of_that_call(
    llama: Any, expected: Any, implementation: str, config: dict[str, Any] | None, layout: str
) -> None:
    made = llama.generate(
        MORE, cache_implementation=implementation, cache_config=config, max_new_tokens=6, return_dict_in_generate=True
    )
    assert made.past_key_values.inner.layout == layout
    if (config or {}).get("residual_length") != 0:  # two bits change the choice; nothing else does
        assert made.sequences.tolist() == expected.tolist()
    else:
        assert made.past_key_values.inner.nbytes < 40_000 and made.sequences.shape == expected.shape


def test_settings_of_a_quantized_cache_reach_the_layout(llama: Any) -> None:
    layout = llama.layouts.of(*hf.caches.quantized({"nbits": 2, "q_group_size": 16, "residual_length": 8}))
    assert {k: layout.settings[k] for k in ("bits", "group_size", "residual")} == {
        "bits": 2,
        "group_size": 16,
        "residual": 8,
    }


def test_both_meanings_of_crop(llama: Any) -> None:
    cache = hf.DynamicCache()
    llama(MORE, past_key_values=cache)
    cache.crop(6)  # before 5.17: keep so many
    assert cache.get_seq_length() == 6
    cache.crop(-2)  # since: take back so many
    cache.crop(0)
    cache.crop(99)
    assert cache.get_seq_length() == 4
    with pytest.raises(CacheError, match="more than the 4 tokens"):
        cache.crop(-5)


def test_rows_are_repeated_chosen_and_reordered(llama: Any) -> None:
    cache = hf.DynamicCache()
    llama(torch.tensor([[0, 5, 70], [0, 9, 8]]), past_key_values=cache)
    first = cache[0][0]
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 4
    cache.batch_select_indices(torch.tensor([3, 0]))
    assert torch.equal(cache[0][0], first.flip(0))
    cache.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(cache[0][0], first[[0, 0]])
    cache.reset()
    assert cache.get_seq_length() == 0


def test_the_older_tuples_there_and_back(llama: Any, expected: Any) -> None:
    cache = hf.DynamicCache()
    llama(IDS, past_key_values=cache)
    pairs = cache.to_legacy_cache()
    assert len(pairs) == len(cache) == 2 and pairs[0][0].shape == (1, 3, 5, 8)
    again = hf.DynamicCache.from_legacy_cache(pairs)
    assert again.get_seq_length() == 5 and torch.equal(again.key_cache[1], pairs[1][0])
    assert llama.generate(MORE, past_key_values=again, max_new_tokens=6).tolist() == expected.tolist()
    by_hand = hf.DynamicCache(pairs)
    assert [torch.equal(v, w) for v, w in zip(by_hand.value_cache, cache.value_cache, strict=True)] == [True, True]
    assert len(list(by_hand)) == 2


def test_a_copy_goes_its_own_way(llama: Any) -> None:
    cache = hf.DynamicCache()
    llama(IDS, past_key_values=cache)
    twin = copy.deepcopy(cache)
    llama.generate(MORE, past_key_values=twin, max_new_tokens=3)
    assert (cache.get_seq_length(), twin.get_seq_length()) == (5, 10)
    fresh = copy.deepcopy(hf.StaticCache(max_cache_len=20))
    llama(IDS, past_key_values=fresh)
    assert fresh.get_max_cache_shape() == fresh.inner.capacity == 20


def test_a_cache_belongs_to_one_model(llama: Any, folders: dict[str, str]) -> None:
    other = hf.AutoModelForCausalLM.from_pretrained(folders["draft"])
    cache = hf.DynamicCache()
    llama(IDS, past_key_values=cache)
    for use in (lambda: other(MORE[:, 5:], past_key_values=cache), lambda: other.generate(MORE, past_key_values=cache)):
        with pytest.raises(InputError, match="belongs to another model.*\n.*\n.*Make a cache for each model"):
            use()
    named = hf.AutoConfig.from_pretrained(folders["t5"])
    with pytest.raises(InputError, match="made for a t5 model, and is passed to a llama"):
        llama(IDS, past_key_values=hf.DynamicCache(config=named))


def test_a_static_cache_is_as_large_as_it_says(llama: Any) -> None:
    cache = hf.StaticCache(config=llama.config, max_cache_len=9, max_batch_size=1, device="cpu", dtype=torch.float32)
    with pytest.raises(ContextLengthError, match="holds 9 cells a row; prompt and new tokens need 13"):
        llama.generate(MORE, past_key_values=cache, max_new_tokens=6)
    for wrong, message in (
        ({"max_batch_size": 3}, "made for 3 rows, the input has 1"), ({"device": "cuda"}, "made for device cuda"),
        ({"dtype": torch.float16}, "made for dtype torch.float16"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            llama(IDS, past_key_values=hf.StaticCache(max_cache_len=9, **wrong))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: hf.StaticCache(), "max_cache_len=None makes no sense"),
        (lambda: hf.StaticCache(max_cache_len=9, offloading=True), "no fixed addresses"),
        (lambda: hf.StaticCache(max_cache_len=9, offload_only_non_sliding=False), "nothing is offloaded"),
        (lambda: hf.DynamicCache(offload_only_non_sliding=True), "on the host, or none"),
        (lambda: hf.QuantizedCache("fp8"), 'Pass "quanto" or "hqq"'),
        (lambda: hf.QuantizedCache(axis_value=2), "axis_value=2 makes no sense"),
        (lambda: hf.QuantizedCache(cache_config={"bits": 4}), "no argument 'bits'"),
        (lambda: hf.EncoderDecoderCache((1,)), "made of empty caches"),
        (lambda: hf.EncoderDecoderCache().to_legacy_cache(), "no older form"),
        (lambda: hf.DynamicCache().update(1, 2, 3), "cannot write keys and values"),
    ],
)
def test_what_no_cache_can_be_is_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(PluglmError, match=message):
        make()


def test_an_encoder_decoders_cache_knows_the_encoders_keys(t5: Any) -> None:
    cache = hf.EncoderDecoderCache(hf.DynamicCache(), hf.DynamicCache())
    assert cache.is_updated == {}
    made = t5.generate(IDS, past_key_values=cache, max_new_tokens=4)
    assert made.tolist() == t5.generate(IDS, max_new_tokens=4).tolist()
    assert cache.is_updated == {0: True, 1: True} and cache.get_seq_length() == made.shape[1] - 1
    with pytest.raises(InputError, match="the given cache is in use"):
        t5.generate(IDS, past_key_values=cache, max_new_tokens=4)
    static = hf.EncoderDecoderCache(hf.StaticCache(max_cache_len=12))
    assert t5.generate(IDS, past_key_values=static, max_new_tokens=4).tolist() == made.tolist()
    assert static.inner.layout == "static" and static.inner.capacity == 12
