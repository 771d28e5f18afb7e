"""Text of token ids as they come: only whole characters, and nothing that may turn out to be a stop string.

A token can hold part of a character, and its text can depend on the token before it (a leading space). So each step
decodes a short window: the tokens released last, as context, and the new ones. What the window gains is released.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

_HALF = "\ufffd"


def cut_at_stop(text: str, stop: Sequence[str]) -> str:
    """`text` before the first occurrence of any stop string; all of it if there is none."""
    at = _first(text, stop)
    return text if at is None else text[:at]


class TextStream:
    """Turns token ids into pieces of text; joined, the pieces are the decoded text, cut before a stop string.

    That holds where text of whole characters stays as it is when tokens follow: byte-level decoders, and all others on
    valid UTF-8. (A decoder that turns a run of byte tokens into U+FFFD as a whole may do so after the run's first
    characters were released.)

    Args:
        decode: token ids -> text, with U+FFFD for bytes that are not yet a whole character.
        stop: strings that end the text; a piece never holds any part of one.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stop: tuple[str, ...] = ()) -> None:
        self._decode = decode
        self._stop = tuple(s for s in stop if s)
        self._window: list[int] = []
        self._known = 0  # leading tokens of the window whose text was released
        self._context = ""  # the text of these
        self._held = ""  # whole characters that may be the head of a stop string
        #: True once a stop string was found; what is pushed later is dropped.
        self.stopped = False

    def push(self, token_id: int) -> str:
        """The text that this token completes, "" if it completes none."""
        if self.stopped:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(_HALF):
            return ""
        if self._known and text == self._context:
            self._window.pop()  # a token without text (a control token) is of no use as context
            return ""
        new = text[len(self._context) :]
        if new:
            del self._window[: self._known]
            self._known = len(self._window)
            self._context = self._decode(self._window)
        return self._released(new, final=False)

    def finish(self) -> str:
        """What was held back, half characters included. The stream is empty afterwards."""
        if self.stopped:
            return ""
        new = self._decode(self._window)[len(self._context) :] if self._window else ""
        self._window, self._known, self._context = [], 0, ""
        return self._released(new, final=True)

    def _released(self, new: str, *, final: bool) -> str:
        text = self._held + new
        at = _first(text, self._stop)
        if at is not None:
            self.stopped, self._held = True, ""
            return text[:at]
        keep = 0 if final else self._overlap(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _overlap(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = min(max(map(len, self._stop), default=1) - 1, len(text))
        for length in range(longest, 0, -1):
            if any(s.startswith(text[-length:]) for s in self._stop):
                return length
        return 0


def _first(text: str, stop: Sequence[str]) -> int | None:
    found = [at for s in stop if s and (at := text.find(s)) >= 0]
    return min(found, default=None)
