"""Assistants with another tokenizer: how texts are spelt in two vocabularies, and that the tokens stay the model's."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pluglm_decoding_speculative.assistant import Assistant, read_assistant
from pluglm_decoding_speculative.spelling import Bilingual
from pluglm_decoding_speculative.strategies import Assisted
from speculating import Foreign, Merging, Remembering, V, call, foreign, plain, repeats, same

from pluglm.contracts import DecodingRequest
from pluglm.errors import ContextLengthError, InputError, UnsupportedRequestError
from pluglm.testing.decoding import text
from pluglm.testing.scripted_model import ScriptedModel

ROWS = ((5, 7, 9, 11, 5, 7), (6, 8), (2,), (3, 4, 5, 3, 4, 5, 3))
LETTERS = Merging()
PAIRS = Merging("fl", "hj", "de", "lfh", "jl", "ded", "rd", "ie", "mi", "qf", "fl" + "hj")
REQUEST = DecodingRequest(V, "cpu", LETTERS.decode, encode=LETTERS.encode)


def row(prompt: list[int], model: Merging, assistant: Merging, back: int = 3) -> Bilingual:
    return Bilingual(
        prompt, model.spelling, assistant.spelling, start=(), model_lookbehind=back, assistant_lookbehind=back
    )  # fmt: skip


@given(
    st.lists(st.lists(st.integers(2, 6), max_size=5), max_size=6), st.integers(1, 6), st.booleans()
)  # fmt: skip
def test_the_assistant_reads_what_the_model_wrote(parts: list[list[int]], back: int, other_way: bool) -> None:
    """Whatever the borders: the text is the same."""
    merging = Merging("cd", "de", "dee", "ef", "fc", "cdef", "gg")
    model, assistant = (merging, LETTERS) if other_way else (LETTERS, merging)
    mine, written = row([4], model, assistant, back), [4]
    for part in parts:
        mine.extend(part)
        written += part
        assert assistant.decode(mine.ids) == model.decode(written)


def test_a_border_is_spelt_anew_as_far_as_it_changes() -> None:
    mine = row(LETTERS.encode("xabf".replace("x", "c")), LETTERS, PAIRS)
    before = list(mine.ids)
    mine.extend(LETTERS.encode("lh"))
    assert PAIRS.decode(mine.ids) == "cabflh"
    assert mine.ids[: len(before) - 1] == before[:-1]
    assert mine.ids[-2:] == PAIRS.encode("flh")


@pytest.mark.parametrize(
    ("written", "guess", "spelt"),
    (
        ("ab", "cfl", "cfl"),  # nothing at the border
        ("abf", "lc", "lc"),  # the model would have spelt f and l as one, had it known
        ("fl", "hj", "hj"),
        ("ab", "", ""),
    ),
)
def test_a_guess_goes_on_after_the_models_own_tokens(written: str, guess: str, spelt: str) -> None:
    mine = row(PAIRS.encode(written), PAIRS, LETTERS)
    assert PAIRS.decode(mine.back(LETTERS.encode(guess))) == spelt


def test_bytes_that_are_no_character_yet_are_not_guessed() -> None:
    class Bytes(Merging):
        def decode(self, ids: Any) -> str:
            return "".join("\ufffd" if i == 7 else self.texts[i] for i in ids)

    mine = row([2, 3], LETTERS, Bytes())
    assert mine.back([7]) == []
    assert mine.back([4, 7]) == [4]
    assert mine.back([7, 4]) == []


@pytest.mark.parametrize("tokenizer", (LETTERS, PAIRS), ids=("letters", "pairs"))
@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("said", ({}, {"temperature": 1.2, "seed": (1, 2, 3, 4)}), ids=("greedy", "sampling"))
def test_tokens_are_those_of_plain_decoding_for_ragged_batches(
    tokenizer: Merging, side: str, said: dict[str, Any]
) -> None:
    strategy = Assisted(REQUEST, foreign(tokenizer))
    said = {"max_new_tokens": 24, "num_assistant_tokens": 3, **said}
    own = {name: value for name, value in said.items() if name != "num_assistant_tokens"}
    expected = plain(ROWS, side=side, **own)
    assert same(call(strategy, Remembering(V, repeats), ROWS, side=side, **said), expected)
    assert strategy.statistics.accepted > 10
    assert strategy.statistics.guessed > strategy.statistics.accepted
    if not own.get("temperature"):
        alone = call(strategy, Remembering(V, repeats), [ROWS[3]], **said)
        assert alone.completion(0) == expected.completion(3)
        assert strategy.statistics.accepted > 5


@pytest.mark.parametrize("back", (1, 2, 30))
def test_the_lookbehind_changes_no_token(back: int) -> None:
    strategy = Assisted(REQUEST, foreign(PAIRS))
    said: dict[str, Any] = {"target_lookbehind": back, "assistant_lookbehind": back}
    got = call(strategy, Remembering(V, repeats), ROWS, max_new_tokens=20, **said)
    assert same(got, plain(ROWS, max_new_tokens=20))
    assert strategy.statistics.accepted > 5
    with pytest.raises(InputError, match="assistant_lookbehind=0 makes no sense"):
        call(strategy, Remembering(V, repeats), ROWS, assistant_lookbehind=0)


def test_a_full_cache_of_the_assistant_is_filled_anew() -> None:
    assistant = foreign(LETTERS)
    strategy = Assisted(REQUEST, assistant)
    said: dict[str, Any] = {"num_assistant_tokens": 2, "assistant_confidence_threshold": 0.0}
    rows = ROWS * 2
    got = call(strategy, Remembering(V, repeats), rows, max_new_tokens=50, **said)
    assert same(got, plain(rows, max_new_tokens=50))
    assert len(assistant.model.caches) > 1
    assert strategy.statistics.accepted > 50


def test_a_text_that_outgrows_the_assistants_context_goes_on_without_guesses() -> None:
    strategy = Assisted(REQUEST, foreign(LETTERS, max_seq_len=14))
    assert same(call(strategy, Remembering(V, repeats), ROWS, max_new_tokens=20), plain(ROWS, max_new_tokens=20))
    assert 0 < strategy.statistics.accepted < 40
    strategy = Assisted(REQUEST, foreign(LETTERS, max_seq_len=6))
    with pytest.raises(ContextLengthError, match="prompt is 7 tokens of the assistant's, and its context holds 6"):
        call(strategy, Remembering(V, repeats), ROWS, max_new_tokens=20)


def test_an_end_token_of_the_assistants_is_no_guess() -> None:
    class Ending(Foreign):
        def scores(self, history: tuple[int, ...]) -> list[float]:
            return [9.0 if i == 1 else 0.0 for i in range(self.vocab_size)]

    ending = Assistant(Ending(LETTERS), V, None, LETTERS.decode, LETTERS.spelling, ends=frozenset({1}), translates=True)
    strategy = Assisted(REQUEST, ending)
    assert same(call(strategy, Remembering(V, repeats), ROWS), plain(ROWS))
    assert strategy.statistics.guessed == 0


def test_an_assistant_translates_only_if_it_must_and_both_tokenizers_are_known() -> None:
    ours = Assistant(ScriptedModel(V), V, None, text, LETTERS.spelling)
    assert not read_assistant(ours, DecodingRequest(V, "cpu", text, encode=LETTERS.encode)).translates
    theirs = Assistant(ScriptedModel(V + 11), V + 11, None, PAIRS.decode, PAIRS.spelling)
    assert read_assistant(theirs, REQUEST).translates
    with pytest.raises(
        UnsupportedRequestError, match=r"has 34 token ids, the model 23, and the tokenizer of the model"
    ):
        read_assistant(theirs, DecodingRequest(V, "cpu", text))
    with pytest.raises(UnsupportedRequestError, match=r"tokenizer of the assistant is not known[\s\S]*pluglm.load"):
        read_assistant(Assistant(ScriptedModel(V + 1), V + 1, None), REQUEST)
