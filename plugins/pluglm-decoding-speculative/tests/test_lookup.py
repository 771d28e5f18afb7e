"""The n-gram index: what it finds, and that it finds what a search through the whole text does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from pluglm_decoding_speculative.lookup import Lookup, NgramIndex
from pluglm_decoding_speculative.proposals import Proposal


def searched(text: list[int], longest: int, count: int) -> list[int]:
    """The same by brute force."""
    for size in range(min(longest, len(text) - 1), 0, -1):
        for start in range(len(text) - 1, size - 1, -1):
            if text[start - size : start] == text[-size:]:
                period = len(text) - start
                return [text[start + i % period] for i in range(count)]
    return []


@given(
    st.lists(st.lists(st.integers(0, 3), max_size=6), max_size=8), st.integers(1, 4), st.integers(1, 7)
)  # fmt: skip
def test_it_finds_what_a_search_through_the_text_finds(parts: list[list[int]], longest: int, count: int) -> None:
    index, text = NgramIndex([], longest), []
    for part in parts:
        index.extend(part)
        text += part
        assert index.continuation(count) == searched(text, longest, count)


def test_the_longest_run_wins_and_of_equal_ones_the_last() -> None:
    assert NgramIndex([1, 2, 3, 9, 2, 4, 1, 2], 2).continuation(2) == [3, 9]
    assert NgramIndex([1, 2, 3, 9, 2, 4, 1, 2], 1).continuation(2) == [4, 1]


def test_a_repetition_goes_on_beyond_the_end_of_the_text() -> None:
    assert NgramIndex([5, 6, 7, 6, 7], 2).continuation(5) == [6, 7, 6, 7, 6]


def test_nothing_is_guessed_where_nothing_repeats() -> None:
    assert NgramIndex([1, 2, 3], 2).continuation(4) == []
    assert Lookup([[1, 2, 3]], count=4, longest=2, eos=()).propose({0: 9}) == {}


def test_nothing_is_guessed_behind_an_end_token_or_without_room() -> None:
    lookup = Lookup([[4, 1, 5, 4]], count=4, longest=2, eos=(1,))
    assert lookup.propose({0: 9}) == {0: Proposal([1])}
    assert lookup.propose({0: 0}) == {}


def test_a_guess_that_failed_is_followed_by_shorter_ones_until_one_holds() -> None:
    lookup = Lookup([[4, 4, 4, 4]], count=8, longest=1, eos=())
    lengths = []
    for matched in (0, 2, 1, 4):
        guess = lookup.propose({0: 99})[0].tokens
        lengths.append(len(guess))
        lookup.learn(0, [4] * (matched + 1), matched)
    assert lengths == [8, 2, 8, 4]
    assert len(lookup.propose({0: 99})[0].tokens) == 8
