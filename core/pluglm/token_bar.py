"""A progress bar over the tokens of a running batch."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from pluglm.checkpoint.progress import WAIT_S, open_bar, wanted

if TYPE_CHECKING:
    from torch import Tensor

    from pluglm.contracts.decoding import Streamer


class TokenBar:
    """A streamer that draws: on stderr, on a terminal, once the work has lasted a second. It passes everything on.

    Args:
        rows, steps: how many rows are made, and how many tokens each at most. inner: the caller's own streamer.
    """

    def __init__(self, rows: int, steps: int | None, inner: Streamer | None) -> None:
        self._label, self._steps, self._inner = f"generating {rows} row{'s' if rows != 1 else ''}", steps, inner
        self._began, self._done, self._shown = time.monotonic(), 0, wanted()
        self._bar: Any = None
        self._task: Any = None

    def put(self, token_ids: Tensor) -> None:
        """[B] ids of one step."""
        if self._inner is not None:
            self._inner.put(token_ids)
        self._done += 1
        if self._shown and self._bar is None and time.monotonic() - self._began > WAIT_S:
            self._bar, self._task = open_bar(self._label, self._steps, in_bytes=False)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)

    def end(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
        if self._inner is not None:
            self._inner.end()
