"""Streams of text over a byte-level tokenizer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from pluglm.text_stream import TextStream, cut_at_stop


@pytest.fixture
def native(make: Callable[..., Path]) -> Tokenizer:
    return Tokenizer.from_file(str(make() / "tokenizer.json"))


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.integers(0, 329), max_size=40))
def test_pieces_of_any_ids_are_the_decoded_text(native: Tokenizer, ids: list[int]) -> None:
    stream = TextStream(native.decode)
    pieces = [stream.push(i) for i in ids if i < native.get_vocab_size()]
    assert "".join(pieces) + stream.finish() == native.decode(ids)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    text=st.text(alphabet="ab🙂é \n", max_size=30),
    stop=st.lists(st.text(alphabet="ab🙂", min_size=1, max_size=3), max_size=3),
)
def test_pieces_end_before_the_first_stop_string(native: Tokenizer, text: str, stop: list[str]) -> None:
    stream = TextStream(native.decode, tuple(stop))
    got = "".join(stream.push(i) for i in native.encode(text, add_special_tokens=False).ids) + stream.finish()
    expected = cut_at_stop(text, stop)
    if stream.stopped:
        assert text.startswith(got)
        assert not any(s in got for s in stop)
        assert len(got) >= len(expected) - max(map(len, stop))
    else:
        assert got == text == expected


def test_half_a_character_is_held_back(native: Tokenizer) -> None:
    stream = TextStream(native.decode)
    assert [stream.push(native.token_to_id(c)) for c in "ðŁĻĤ"] == ["", "", "", "🙂"]


def test_half_a_character_at_the_end_is_given_at_the_end(native: Tokenizer) -> None:
    stream = TextStream(native.decode)
    assert stream.push(native.token_to_id("ð")) == ""
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""


def test_what_may_become_a_stop_string_is_held_back() -> None:
    stream = TextStream(lambda ids: "".join(map(chr, ids)), stop=("STOP", "\n\n"))
    pieces = [stream.push(ord(c)) for c in "aST-STO\nSTOPx"]
    assert pieces == ["a", "", "", "ST-", "", "", "", "STO", "\n", "", "", "", ""]
    assert stream.stopped
    assert stream.finish() == ""


def test_spaces_that_belong_to_the_next_word_are_kept() -> None:
    words = ["▁hello", "▁world", "!"]

    def decode(ids: list[int]) -> str:  # as SentencePiece does: the first space goes
        return "".join(words[i] for i in ids).replace("▁", " ").removeprefix(" ")

    stream = TextStream(decode)
    assert [stream.push(i) for i in (0, 1, 1, 2)] == ["hello", " world", " world", "!"]
