"""Early exit: which models and layers it takes, and what it costs."""

from __future__ import annotations

import pytest
from pluglm_decoding_speculative.strategies import EarlyExit
from speculating import Remembering, V, build, call, plain, repeats, same

from pluglm.contracts import DecodingRequest
from pluglm.errors import InputError, UnsupportedRequestError
from pluglm.testing.decoding import LONG, text
from pluglm.testing.scripted_model import ScriptedModel

ROWS = ((5, 7, 9, 11, 5, 7), (6, 8), (2,), (3, 4, 5, 3, 4, 5, 3))


def test_a_model_without_a_program_is_refused() -> None:
    with pytest.raises(UnsupportedRequestError, match=r"not built from a program[\s\S]*assisted") as caught:
        call(EarlyExit(DecodingRequest(V, "cpu", text), 1), ScriptedModel(V), [LONG])
    assert caught.value.reasons


def test_the_number_of_layers_must_be_said_and_make_sense() -> None:
    strategy = EarlyExit(DecodingRequest(V, "cpu", text))
    with pytest.raises(InputError, match=r"after how many layers[\s\S]*assistant_early_exit=…"):
        call(strategy, ScriptedModel(V), [LONG])
    with pytest.raises(InputError, match="assistant_early_exit=0 makes no sense"):
        call(strategy, ScriptedModel(V), [LONG], assistant_early_exit=0)
    with pytest.raises(UnsupportedRequestError, match="option 'assistant_early_exit' is 'few', not an integer >= 1"):
        build("early-exit", options=(("assistant_early_exit", "few"),))


def test_the_price_of_a_cell_must_make_sense() -> None:
    with pytest.raises(UnsupportedRequestError, match="option 'token_price' is -1, not a number >= 0"):
        build("prompt-lookup", options=(("token_price", -1),))


def test_the_draft_writes_into_the_models_cache_and_leaves_nothing_there() -> None:
    """No cache of its own, no pass over the prompt; after the call the cache holds what plain decoding leaves."""
    draft, model = Remembering(V, repeats), Remembering(V, repeats)
    strategy = EarlyExit(DecodingRequest(V, "cpu", text), 1)
    strategy.cut = lambda model, count: draft  # type: ignore[method-assign, assignment, return-value]
    cache = model.new_cache(batch_size=1)
    output = call(
        strategy, model, [ROWS[0]], max_new_tokens=30, num_assistant_tokens=4, assistant_confidence_threshold=0.0,
        past_key_values=cache,
    )  # fmt: skip
    assert same(output, plain([ROWS[0]], max_new_tokens=30))
    assert strategy.statistics.accepted == strategy.statistics.guessed > 20
    assert draft.caches == []
    assert set(draft.fed) == {1}
    assert cache.history(0, cache.length) == tuple(output.sequences[0, :-1].tolist())
