"""The hypotheses of one search: beams that go on, and the best of those that have ended.

Rules and numbers as in transformers 5.23 `_beam_search`; each search is on its own, whatever else is in the batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pluglm.contracts import FinishReason
from pluglm_decoding_beam.beam_settings import BeamSettings
from pluglm_decoding_beam.tracker import START, State


@dataclass(frozen=True, slots=True)
class Beam:
    """A hypothesis: the beam it continues and one more token.

    Attributes:
        score: sum of its tokens' processed scores; -inf: `NOBODY`, only a place in the batch.
        place: which of its search's rows held its parent. token: the last one.
        logprob: of that token under the model itself. parent: None for the prompt.
        state: which required phrases it holds; `START` where there are none.
    """

    score: float
    place: int
    token: int
    logprob: float
    parent: Beam | None
    state: State = START

    def path(self) -> list[Beam]:
        """From the first new token to this one; the prompt is not one of them."""
        path: list[Beam] = []
        beam: Beam | None = self
        while beam is not None and beam.parent is not None:
            path.append(beam)
            beam = beam.parent
        return path[::-1]

    def tokens(self) -> list[int]:
        """The new tokens."""
        return [beam.token for beam in self.path()]

    def last(self, count: int) -> list[int]:
        """The last `count` of the new tokens."""
        tokens: list[int] = []
        beam = self
        while len(tokens) < count:
            assert beam.parent is not None
            tokens.append(beam.token)
            beam = beam.parent
        return tokens[::-1]


#: A continuation, and the reason for which it ends, if it does.
Candidate = tuple[Beam, FinishReason | None]

NOBODY = Beam(-math.inf, 0, -1, 0.0, None)


@dataclass(frozen=True, slots=True)
class Ended:
    """A hypothesis that has ended.

    Attributes:
        score: with the length penalty, by which ended ones are compared. length: new tokens.
        first_row: of its search, see `Search`.
    """

    score: float
    beam: Beam
    reason: FinishReason
    length: int
    first_row: int


class Search:
    """One search: one prompt, or one group of one prompt.

    Args:
        limit: new tokens at most. first_row: the row of the batch that its first place is.

    Attributes:
        beams: those that go on, best first, `width` places of which some may be nobody's.
        ended: best first, at most `width`. length: new tokens so far. done: nothing can change `ended` any more.
        limit, first_row: as given.
    """

    def __init__(self, settings: BeamSettings, limit: int, first_row: int) -> None:
        self._settings, self.limit, self.first_row = settings, limit, first_row
        root = Beam(0.0, 0, -1, 0.0, None)
        # All places hold the same prompt; only one may be continued, or every candidate would be there `width` times.
        self.beams: list[Beam] = [root, *[NOBODY] * (settings.width - 1)]
        self.ended: list[Ended] = [] if limit else [Ended(0.0, root, "length", 0, first_row)] * settings.width
        self.length = 0
        self.done = limit == 0

    def take(self, ended: Sequence[tuple[Beam, FinishReason]], going_on: Sequence[Beam]) -> None:
        """Go one token on, with the continuations that end now and why, and those that go on: at most `width`."""
        width = self._settings.width
        self.length += 1
        for beam, reason in ended:
            self._end(beam, reason)
        self.beams = sorted(going_on, key=lambda beam: -beam.score)
        self.done = not self.beams or not self._can_improve()
        self.beams += [NOBODY] * (width - len(self.beams))

    def _end(self, beam: Beam, reason: FinishReason) -> None:
        """Keep it, if it is one of the best."""
        score = self._valued(beam.score, self.length)
        self.ended.append(Ended(score, beam, reason, self.length, self.first_row))
        self.ended.sort(key=lambda ended: -ended.score)  # stable: of equal ones the older stays in front
        del self.ended[self._settings.width :]

    def _can_improve(self) -> bool:
        """May a beam that goes on still become one of the best?"""
        early, penalty = self._settings.early_stopping, self._settings.length_penalty
        if len(self.ended) < self._settings.width:
            return True
        if early is True:
            return False
        # Scores only fall. Divided by a power of the length they may rise; then the longest is the best it can do.
        length = self.limit if early == "never" and penalty > 0 else self.length
        return self._valued(self.beams[0].score, length) > self.ended[-1].score

    def _valued(self, score: float, length: int) -> float:
        return float(score / length**self._settings.length_penalty)


def ranked(groups: Sequence[Search]) -> list[Ended]:
    """The ended hypotheses of one prompt's groups, best first; of equal ones that of the earlier group."""
    return sorted((ended for search in groups for ended in search.ended), key=lambda ended: -ended.score)
