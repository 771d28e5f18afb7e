"""Where each row ends and why, told token by token on the host."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pluglm.contracts import FinishReason
from pluglm.text_stream import TextStream
from pluglm_decoding_blocks.settings import Settings


class Endings:
    """The new tokens of every row, counted.

    Args:
        limits: new tokens of each row at most. decode: token ids -> text; needed where there are stop strings.

    Attributes:
        counts: new tokens of each row so far. reasons: why each row ended; of a row that goes on it means nothing.
    """

    def __init__(
        self, settings: Settings, limits: Sequence[int], decode: Callable[[Sequence[int]], str] | None
    ) -> None:
        self.limits = limits
        self.counts = [0] * len(limits)
        self.reasons: list[FinishReason] = ["length"] * len(limits)
        self._min_new = settings.min_new
        self._eos = frozenset(settings.eos)
        self._texts: list[TextStream] | None = None
        if settings.stop:
            assert decode is not None  # `read_settings` has looked
            self._texts = [TextStream(decode, settings.stop) for _ in limits]

    def push(self, row: int, token: int, *, done: bool = False) -> bool:
        """Take note of a row's next token. done: a criterion of the caller's says so. Returns whether the row ends."""
        self.counts[row] += 1
        reason = self._reason(row, token, done)
        if reason is None:
            return False
        self.reasons[row] = reason
        return True

    def _reason(self, row: int, token: int, done: bool) -> FinishReason | None:
        count = self.counts[row]
        if token in self._eos:
            return "eos"
        if self._texts is not None:
            self._texts[row].push(token)
            if self._texts[row].stopped and count >= self._min_new:
                return "stop"
        if done:
            return "stop"
        return "length" if count >= self.limits[row] else None
