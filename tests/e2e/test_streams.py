"""A text that outgrows the model's context, in a cache that streams."""

from __future__ import annotations

from pathlib import Path

import pytest

import pluglm
from pluglm.completions import Completion
from pluglm.errors import ContextLengthError, PlanError

CONTEXT = 192
PROMPT = [60, 17, 201, 5, 99]


@pytest.fixture(scope="module")
def streaming(folder: Path) -> pluglm.LanguageModel:
    return pluglm.load(folder, cache="sink", options={"cache": {"window": 40}})


def test_a_completion_outgrows_the_context_in_constant_memory(streaming: pluglm.LanguageModel) -> None:
    cache = streaming.new_cache()
    done = streaming.complete(PROMPT, max_new_tokens=2 * CONTEXT, eos_token_id=(), past_key_values=cache)
    assert isinstance(done, Completion)
    assert (len(done.token_ids), done.finish_reason) == (2 * CONTEXT, "length")
    held, length = cache.nbytes, cache.length
    assert length > 2 * CONTEXT
    again = [*PROMPT, *done.token_ids, 7]
    streaming.complete(again, max_new_tokens=200, eos_token_id=(), past_key_values=cache)
    assert cache.length > length + 190
    assert cache.nbytes == held


def test_while_nothing_is_evicted_it_generates_what_any_cache_does(
    streaming: pluglm.LanguageModel, lm: pluglm.LanguageModel
) -> None:
    assert streaming.generate([PROMPT, [8, 9]], max_new_tokens=30) == lm.generate([PROMPT, [8, 9]], max_new_tokens=30)


def test_a_prompt_longer_than_the_context_is_fed_in_parts(streaming: pluglm.LanguageModel) -> None:
    prompt = PROMPT * 60
    with pytest.raises(ContextLengthError, match="prefill_chunk_size") as caught:
        streaming.complete(prompt, max_new_tokens=3)
    assert (caught.value.tokens, caught.value.limit) == (300, CONTEXT)
    done = streaming.complete(prompt, max_new_tokens=3, prefill_chunk_size=20, eos_token_id=())
    assert isinstance(done, Completion)
    assert len(done.token_ids) == 3


def test_rows_of_a_batch_are_the_rows_alone_beyond_the_context(streaming: pluglm.LanguageModel) -> None:
    rows = [PROMPT * 7, [8, 9, 30]]
    batch = streaming.complete(rows, max_new_tokens=CONTEXT, eos_token_id=())
    assert isinstance(batch, list)
    for row, completion in zip(rows, batch, strict=True):
        alone = streaming.complete(row, max_new_tokens=CONTEXT, eos_token_id=())
        assert isinstance(alone, Completion)
        assert alone.token_ids == completion.token_ids


def test_without_a_cache_the_context_is_the_limit(streaming: pluglm.LanguageModel) -> None:
    with pytest.raises(ContextLengthError):
        streaming.complete(PROMPT, max_new_tokens=CONTEXT, use_cache=False)


def test_a_cache_that_does_not_stream_keeps_the_limit(
    streaming: pluglm.LanguageModel, lm: pluglm.LanguageModel
) -> None:
    with pytest.raises(ContextLengthError):
        streaming.complete(PROMPT, max_new_tokens=CONTEXT, past_key_values=lm.new_cache())
    cache = streaming.new_cache()
    done = lm.complete(PROMPT, max_new_tokens=CONTEXT, past_key_values=cache, eos_token_id=())
    assert isinstance(done, Completion)
    assert len(done.token_ids) == CONTEXT


def test_auto_never_chooses_a_cache_that_forgets(lm: pluglm.LanguageModel) -> None:
    rejected = {r.provider: r.reasons for r in lm.plan["cache"].rejected}
    assert any("changes what is generated" in reason for reason in rejected["pluglm-caches:cache/sink"])


def test_a_window_beyond_the_context_is_refused(folder: Path) -> None:
    with pytest.raises(PlanError, match="context of 192 must hold both"):
        pluglm.load(folder, cache="sink", options={"cache": {"window": 189}})
