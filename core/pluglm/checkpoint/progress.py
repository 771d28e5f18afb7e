"""A progress bar for work that turns out to be long: on stderr, only on a terminal, only after a second."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, TypeVar

T = TypeVar("T")
WAIT_S = 1.0


def wanted() -> bool:
    """Whether this process may draw a bar: stderr is a terminal and PLUGLM_PROGRESS is not 0."""
    return os.environ.get("PLUGLM_PROGRESS", "1") != "0" and sys.stderr is not None and sys.stderr.isatty()


def track(
    iterable: Iterable[T],
    label: str,
    *,
    total: int | None = None,
    total_bytes: int | None = None,
    size: Callable[[T], int] | None = None,
) -> Iterator[T]:
    """Yield the items of `iterable`, with a bar once the work has lasted longer than a second.

    Args:
        label: what is going on, in a few words.
        total: number of items, if the bar counts items (the default); taken from `len(iterable)` where it has one.
        total_bytes: sum of `size(item)`, if the bar counts bytes.
        size: bytes of one item; needed with `total_bytes`.
    """
    if not wanted():
        yield from iterable
        return
    goal = total_bytes if total_bytes is not None else total
    if goal is None and isinstance(iterable, Sized):
        goal = len(iterable)
    bar: Any = None
    task: Any = None
    done, began = 0, time.monotonic()
    try:
        for item in iterable:
            if bar is None and time.monotonic() - began > WAIT_S:
                bar, task = open_bar(label, goal, in_bytes=total_bytes is not None)
            if bar is not None:
                bar.update(task, completed=done)
            yield item
            done += size(item) if size is not None else 1
    finally:
        if bar is not None:
            bar.update(task, completed=done)
            bar.stop()


def open_bar(label: str, goal: int | None, *, in_bytes: bool) -> tuple[Any, Any]:
    """A running rich bar and its task; a bar that draws nothing where rich is not installed."""
    try:
        from rich import progress as rich_progress
        from rich.console import Console
    except ImportError:
        return _Silent(), None
    count = rich_progress.DownloadColumn() if in_bytes else rich_progress.MofNCompleteColumn()
    bar = rich_progress.Progress(
        rich_progress.TextColumn("{task.description}"),
        rich_progress.BarColumn(),
        count,
        rich_progress.TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    bar.start()
    return bar, bar.add_task(label, total=goal)


class _Silent:
    """Stands in for a bar where rich is missing."""

    def update(self, task: Any, *, completed: int) -> None:
        """Draw nothing."""

    def stop(self) -> None:
        """Nothing to stop."""
