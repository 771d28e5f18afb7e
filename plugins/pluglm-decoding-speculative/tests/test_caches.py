"""What speculation does to caches: room, holes, given ones; and how far it may go."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pluglm_decoding_speculative.assistant import Assistant
from pluglm_decoding_speculative.strategies import Assisted
from speculating import Remembering, V, batch, build, call, plain, repeats, same

from pluglm.contracts import OPERATIONS, DecodingRequest, StateSlot
from pluglm.errors import ContextLengthError, InputError, UnsupportedRequestError
from pluglm.testing.scripted_model import ScriptedModel

ROWS = ((5, 7, 9, 11, 5, 7), (6, 8), (2,), (3, 4, 5, 3, 4, 5, 3))
NAMES = ("prompt-lookup", "assisted", "early-exit")


class Reaching(Remembering):
    """Remembers the highest position it was fed, of each row."""

    def _run(self, ids: Any, positions: Any, cache: Any, keep: Any) -> Any:
        highest = positions.expand(ids.shape).amax(1)
        self.reached = torch.maximum(getattr(self, "reached", highest), highest)
        return super()._run(ids, positions, cache, keep)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("said", ({}, {"temperature": 1.1, "seed": 3}), ids=("greedy", "sampling"))
def test_no_guess_reaches_beyond_the_last_token_but_one(name: str, said: dict[str, Any]) -> None:
    model = Reaching(V, repeats)
    call(build(name), model, ROWS, max_new_tokens=15, **said)
    assert model.reached.tolist() == [len(row) + 15 - 2 for row in ROWS]


@pytest.mark.parametrize("tokens", (5, 40))
@pytest.mark.parametrize("name", NAMES)
def test_a_cache_of_fixed_size_is_large_enough_and_not_much_larger(name: str, tokens: int) -> None:
    """The scripted cache raises when it is full."""
    model = Remembering(V, repeats)
    for rows in (ROWS, ROWS * 3, [ROWS[0]]):
        assert same(call(build(name), model, rows, max_new_tokens=tokens), plain(rows, max_new_tokens=tokens))
        cache = model.caches[-1]
        width = max(map(len, rows))
        assert cache.capacity == width + (2 if len(rows) > 1 else 1) * tokens


def test_one_row_uses_no_more_cells_than_plain_decoding() -> None:
    model = Remembering(V, repeats)
    cache = model.new_cache(batch_size=1, capacity=len(ROWS[0]) + 29)
    strategy = build("prompt-lookup")
    output = call(strategy, model, [ROWS[0]], max_new_tokens=30, past_key_values=cache)
    assert cache.history(0, cache.length) == tuple(output.sequences[0, :-1].tolist())
    assert cache.length == len(ROWS[0]) + 29
    assert strategy.statistics.accepted > 10


@pytest.mark.parametrize("capacity", (None, 7 + 14))
@pytest.mark.parametrize("name", NAMES)
def test_a_given_cache_of_several_rows_is_left_as_plain_decoding_leaves_it(name: str, capacity: int | None) -> None:
    said: dict[str, Any] = {"max_new_tokens": 15, "eos_token_id": (1, 7)}
    expected = plain(ROWS, **said)
    assert len(set(expected.num_new_tokens)) > 1
    model = Remembering(V, repeats)
    cache = model.new_cache(batch_size=len(ROWS), capacity=capacity)
    output = call(build(name), model, ROWS, past_key_values=cache, **said)
    assert same(output, expected)
    other = Remembering(V, repeats)
    kept = other.new_cache(batch_size=len(ROWS))
    plain(ROWS, other, past_key_values=kept, **said)
    assert cache.length == kept.length
    assert torch.equal(cache.positions, kept.positions)
    real = kept.positions >= 0
    assert torch.equal(cache.tokens[real], kept.tokens[real])


def test_a_given_cache_without_room_for_drawn_guesses_of_all_rows_is_refused() -> None:
    model = Remembering(V, repeats)
    cache = model.new_cache(batch_size=4, capacity=7 + 15)
    with pytest.raises(ContextLengthError, match="holds 22 cells a row; prompt and new tokens need 66"):
        call(build("assisted"), model, ROWS, max_new_tokens=15, temperature=1.0, past_key_values=cache)


def test_a_given_cache_of_several_rows_that_cannot_go_back_is_refused() -> None:
    model = Remembering(V, repeats)
    cache = model.new_cache(batch_size=4)
    cache.slots = (StateSlot(()),)  # type: ignore[assignment]
    with pytest.raises(InputError, match=r"of several rows cannot be used[\s\S]*slots of kind state cannot"):
        call(build("prompt-lookup"), model, ROWS, past_key_values=cache)


@pytest.mark.parametrize("name", NAMES)
def test_models_whose_cache_cannot_take_back_are_refused_before_anything_runs(name: str) -> None:
    model = Remembering(V, repeats, operations=frozenset(OPERATIONS) - {"rollback"})
    with pytest.raises(UnsupportedRequestError, match=r"cache of the model \(scripted\) has no rollback") as caught:
        call(build(name), model, ROWS)
    assert caught.value.reasons
    assert model.fed == []


def test_an_assistant_whose_cache_cannot_take_back_is_refused() -> None:
    helper = ScriptedModel(V, operations=frozenset())
    strategy = Assisted(DecodingRequest(V, "cpu", None), Assistant(helper, V, None))
    with pytest.raises(UnsupportedRequestError, match=r"cache of the assistant \(scripted\) has no rollback"):
        call(strategy, Remembering(V, repeats), ROWS)
    assert helper.fed == []


def test_an_assistant_with_a_shorter_context_than_the_text_is_refused() -> None:
    helper = ScriptedModel(V)
    strategy = Assisted(DecodingRequest(V, "cpu", None), Assistant(helper, V, 20))
    with pytest.raises(ContextLengthError, match="are 21, and the assistant's context holds 20"):
        call(strategy, Remembering(V, repeats), ROWS, max_new_tokens=15)
    assert call(strategy, Remembering(V, repeats), ROWS, max_new_tokens=14).num_new_tokens == (14,) * 4


@pytest.mark.parametrize("schedule", ("constant", "heuristic"))
def test_an_assistant_is_fed_each_token_of_a_row_alone_once_and_guesses_again_only_what_failed(schedule: str) -> None:
    helper = Reaching(V, repeats)
    strategy = Assisted(DecodingRequest(V, "cpu", None), Assistant(helper, V, None))
    call(
        strategy, Remembering(V, repeats), [ROWS[0]], max_new_tokens=30, num_assistant_tokens=4,
        num_assistant_tokens_schedule=schedule, assistant_confidence_threshold=0.0,
    )  # fmt: skip
    assert strategy.statistics.accepted == strategy.statistics.guessed
    assert sum(helper.fed) <= len(ROWS[0]) + 30
    assert strategy.statistics.passes == (6 if schedule == "constant" else 4)


def test_a_step_without_a_guess_is_a_plain_one() -> None:
    model = ScriptedModel(V, lambda h: {len(h) + 2: 1000.0})
    strategy = build("prompt-lookup")
    call(strategy, model, [(2, 3)], max_new_tokens=18)
    assert model.fed == [2] + [1] * 17
    assert strategy.statistics.guessed == 0


def test_padded_rows_are_looked_up_without_their_padding() -> None:
    """The pad token, 0, is a token of the vocabulary: a run of it must not be found."""
    assert "attention_mask" in batch(ROWS)
    strategy = build("prompt-lookup")
    call(strategy, ScriptedModel(V, lambda h: {len(h) + 3: 1000.0}), [(2,), (3, 4, 5, 6, 7)], max_new_tokens=10)
    assert strategy.statistics.guessed == 0
