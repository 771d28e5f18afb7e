"""The n-gram index: what it finds, and that it finds what a search through the whole text does."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from pluglm_decoding_speculative.lookup import Lookup, NgramIndex
from pluglm_decoding_speculative.pace import GOES_ON, STARTS, Luck, late, reach
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
    assert Lookup([[1, 2, 3]], count=4, longest=2, eos=(), price=0.0).propose({0: 9}) == {}


def test_nothing_is_guessed_behind_an_end_token_or_without_room() -> None:
    lookup = Lookup([[4, 1, 5, 4]], count=4, longest=2, eos=(1,), price=0.0)
    assert lookup.propose({0: 9}) == {0: Proposal([1])}
    assert lookup.propose({0: 0}) == {}


def running() -> Luck:
    """A row that is copying, and goes on so four times in five."""
    lucky = Luck()
    lucky.running, lucky.goes_on = True, 0.8
    return lucky


def test_a_guess_is_as_long_as_the_price_of_its_cells_allows() -> None:
    lucky = running()
    guess = {0: [4] * 10}
    assert [reach(guess, [lucky], price, [0]) for price in (0.0, 0.01, 0.05, 0.3, 1.0)] == [10, 10, 8, 4, 2]
    assert [reach(guess, [Luck()], price, [0]) for price in (0.0, 0.01, 0.05, 0.3)] == [10, 6, 3, 0]


def test_a_guess_of_one_row_is_paid_for_by_all_rows() -> None:
    lucky = running()
    assert reach({0: [4] * 10}, [lucky], 0.03, [0]) > 5
    assert reach({0: [4] * 10}, [lucky, *(Luck() for _ in range(7))], 0.03, range(8)) == 0
    assert reach({row: [4] * 10 for row in range(8)}, [lucky] * 8, 0.03, range(8)) > 3


def test_only_rows_that_the_batch_waits_for_are_worth_a_price() -> None:
    assert late({0: 30, 2: 40, 3: 33}) == [2, 3]
    lucky = running()
    rows, guess = [lucky, Luck()], {0: [4] * 10}
    assert reach(guess, rows, 0.03, [0, 1]) > 3
    assert reach(guess, rows, 0.03, [1]) == 0


def test_rows_learn_from_guesses_that_were_not_made() -> None:
    lookup = Lookup([[4, 5, 4]], count=8, longest=1, eos=(), price=1.0)
    assert lookup.propose({0: 99}) == {}
    lookup.learn(0, [5], 0)  # as would have been guessed
    assert lookup._luck[0].running
    assert lookup._luck[0].starts > STARTS
    lookup.propose({0: 99})
    lookup.learn(0, [7], 0)
    assert not lookup._luck[0].running
    assert lookup._luck[0].goes_on < GOES_ON


def test_a_row_whose_guesses_keep_failing_ends_up_with_plain_steps() -> None:
    lookup = Lookup([[4, 4, 4, 4]], count=8, longest=1, eos=(), price=0.03)
    lengths = []
    for other in range(5, 25):  # 4 never follows, though it always seems to
        lengths.append(len(lookup.propose({0: 99}).get(0, Proposal()).tokens))
        lookup.learn(0, [other, 4], 0)
    assert lengths[0] > lengths[-1] == 0
