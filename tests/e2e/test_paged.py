"""Pages end to end: block tables from the cache to the kernel give the tokens that plain tensors give."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import pluglm
from pluglm.contracts import PagedView

PROMPTS = ["the cat sat on a mat", "hello", "read a book of cats . hello world , how are you today ?"]
PAIRS = [("paged", "paged"), ("paged:torch", "paged"), ("eager", "paged"), ("sdpa", "paged"), ("paged", "dynamic")]


@pytest.fixture(scope="module")
def plain(folder: Path) -> pluglm.LanguageModel:
    """The reference: everything in plain tensors."""
    return pluglm.load(folder, attention="eager", cache="dynamic", dtype="float32")


@pytest.mark.parametrize(("attention", "cache"), PAIRS)
def test_greedy_tokens_equal_those_of_plain_tensors_alone_and_in_a_ragged_batch(
    folder: Path, plain: pluglm.LanguageModel, attention: str, cache: str
) -> None:
    lm = pluglm.load(folder, attention=attention, cache=cache, dtype="float32")
    for prompt in PROMPTS:
        assert lm.generate(prompt, max_new_tokens=40) == plain.generate(prompt, max_new_tokens=40)
    assert lm.generate(PROMPTS, max_new_tokens=40) == plain.generate(PROMPTS, max_new_tokens=40)


def test_a_paged_cache_hands_pages_to_an_attention_that_reads_them_and_tensors_to_others(folder: Path) -> None:
    for attention, view in (("paged", "paged"), ("eager", "dense"), ("sdpa", "dense")):
        lm = pluglm.load(folder, attention=attention, cache="paged", dtype="float32")
        cache = lm.new_cache()
        lm.model(torch.tensor([[7, 30, 81]]), past_key_values=cache)
        assert cache.read(0).kind == view


def test_a_prefix_of_another_request_is_not_computed_again_and_the_tokens_stay(folder: Path) -> None:
    lm = pluglm.load(folder, attention="paged", cache="paged", options={"cache": {"page_size": 4}}, dtype="float32")
    ids = torch.tensor([[7, 30, 81, 200, 150, 9, 12, 77, 101, 63, 250]])
    first = lm.new_cache()
    whole = lm.model(ids, past_key_values=first).logits[:, -1]
    first.publish(ids, salt=b"me")
    second = lm.new_cache()
    found = second.adopt_prefix(ids[:, :-1], salt=b"me")
    assert found == 8
    view = second.read(0)
    assert isinstance(view, PagedView)
    assert torch.equal(view.block_table, first.read(0).block_table[:, :2])
    rest = lm.model(ids[:, found:], past_key_values=second).logits[:, -1]
    torch.testing.assert_close(rest, whole, atol=1e-4, rtol=1e-4)
