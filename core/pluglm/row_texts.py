"""The text of several rows that are made side by side, in pieces."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from pluglm.text_stream import TextStream


class Piece(NamedTuple):
    """Some new text of one row. row: of the answers, in the order of `generate`'s list."""

    row: int
    text: str


def pieces(
    steps: Iterable[Sequence[int]], decode: Callable[[Sequence[int]], str], *, stop: tuple[str, ...],
    ends: Collection[int], silent: Collection[int], tails: Sequence[str] = (),
) -> Iterator[Piece]:  # fmt: skip
    """Whole characters of each row as soon as they are known.

    Args:
        steps: a token id a row, -1 for a row that has ended. decode: ids -> text. stop: strings that end a row's text.
        ends: ids that end a row. silent: ids without text.
        tails: text at a prompt's end that its row's new text begins with; it is left out.
    """
    rows: list[TextStream | None] = []  # None: has ended
    skipped: list[int] = []  # characters of each row that are still to be left out
    for step in steps:
        if not rows:
            rows = [TextStream(decode, stop=stop) for _ in step]
            skipped = [len(tails[row * len(tails) // len(step)]) if tails else 0 for row in range(len(step))]
        for row, token in enumerate(step):
            text = rows[row]
            if text is None:
                continue
            over = token < 0 or token in ends
            piece = "" if over or token in silent else text.push(token)
            if over:
                rows[row] = None
                piece = text.finish()
            piece, skipped[row] = piece[skipped[row] :], max(0, skipped[row] - len(piece))
            if piece:
                yield Piece(row, piece)
    for row, text in enumerate(rows):
        if text is not None and (piece := text.finish()[skipped[row] :]):
            yield Piece(row, piece)
