"""The bar shows on a terminal, after a second, and nowhere else; the items are the same in any case."""

from __future__ import annotations

import importlib
import io
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from pluglm.checkpoint import track

progress = importlib.import_module("pluglm.checkpoint.progress")


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def _terminal(monkeypatch: pytest.MonkeyPatch) -> _Terminal:
    # Called in the test: pytest's own capture takes stderr back after the fixtures.
    stream = _Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.delenv("PLUGLM_PROGRESS", raising=False)
    return stream


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    calls: list[Any] = []

    def open_bar(label: str, goal: int | None, *, in_bytes: bool) -> tuple[Any, Any]:
        calls.append((label, goal, in_bytes))
        return progress._Silent(), None

    monkeypatch.setattr(progress, "open_bar", open_bar)
    return calls


def test_short_work_shows_nothing(opened: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _terminal(monkeypatch)
    assert list(track([1, 2, 3], "reading")) == [1, 2, 3]
    assert opened == []
    assert terminal.getvalue() == ""


def test_long_work_shows_a_bar_once(opened: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _terminal(monkeypatch)
    monkeypatch.setattr(progress, "WAIT_S", -1.0)
    assert list(track([1, 2, 3], "reading")) == [1, 2, 3]
    assert list(track(iter([5]), "writing", total_bytes=5, size=lambda item: item)) == [5]
    assert opened == [("reading", 3, False), ("writing", 5, True)]


def test_the_variable_switches_it_off(opened: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _terminal(monkeypatch)
    monkeypatch.setattr(progress, "WAIT_S", -1.0)
    monkeypatch.setenv("PLUGLM_PROGRESS", "0")
    assert list(track([1], "reading")) == [1]
    assert opened == []


def test_without_a_terminal_there_is_no_bar(opened: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "WAIT_S", -1.0)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert list(track([1], "reading")) == [1]
    assert opened == []


def test_the_bar_of_rich_draws_to_stderr(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = _terminal(monkeypatch)
    pytest.importorskip("rich")
    monkeypatch.setattr(progress, "WAIT_S", -1.0)
    monkeypatch.setenv("TERM", "xterm")
    assert list(track([10, 20], "reading weights", total_bytes=30, size=lambda item: item)) == [10, 20]
    assert "reading weights" in terminal.getvalue()


def test_without_rich_the_work_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    _terminal(monkeypatch)
    monkeypatch.setattr(progress, "WAIT_S", -1.0)
    monkeypatch.setitem(sys.modules, "rich", None)
    assert list(track([1, 2], "reading")) == [1, 2]


def test_an_error_in_the_work_comes_through(monkeypatch: pytest.MonkeyPatch) -> None:
    _terminal(monkeypatch)
    monkeypatch.setattr(progress, "WAIT_S", -1.0)

    def items() -> Iterator[int]:
        yield 1
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        list(track(items(), "reading"))
