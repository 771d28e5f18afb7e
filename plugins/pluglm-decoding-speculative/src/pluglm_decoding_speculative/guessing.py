"""Guesses of a model in the ids of the model that checks them: token by token, for all rows of a ragged batch at once.

Where the guessing model keeps its text is another matter: in a cache of its own (`draft`), or in the cache of the model
itself (`self_draft`). Source: Leviathan et al. 2023, section 2; names of the settings as in transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from pluglm_decoding_blocks.processors import Processors
from torch import Tensor

from pluglm_decoding_speculative.choosing import Guesser, SpeculativeSampled, probabilities
from pluglm_decoding_speculative.loop import Shape, Texts
from pluglm_decoding_speculative.proposals import Proposal


@dataclass(frozen=True)
class Schedule:
    """How far a model guesses ahead.

    Attributes:
        count: tokens of a guess, at first. adaptive: two more after a guess that held wholly, else one less.
        confidence: a guess ends with the token to which the model gives less probability; 0: never so.
    """

    count: int = 20
    adaptive: bool = False
    confidence: float = 0.4


class Counts:
    """How many tokens each row's next guess may have, as the schedule says and the guesses before went."""

    def __init__(self, schedule: Schedule, rows: int) -> None:
        self._adaptive = schedule.adaptive
        self._count = [schedule.count] * rows

    def wanted(self, room: Mapping[int, int]) -> dict[int, int]:
        """Row -> tokens, of the rows that may have some. room: row -> tokens at most."""
        return {row: count for row, most in room.items() if (count := min(most, self._count[row])) > 0}

    def learn(self, row: int, guessed: int, matched: int) -> None:
        """matched: how many of the `guessed` tokens held."""
        if guessed and self._adaptive:
            self._count[row] = self._count[row] + 2 if matched == guessed else max(1, self._count[row] - 1)


@dataclass(frozen=True)
class Chooses:
    """How a guessing model's tokens are chosen: as the model's own are.

    Attributes:
        choose: draws or takes the best. process, shape: what the model's scores go through.
        texts: what the rows have so far; guesses are tried on in its tensor.
        eos: ends a guess. confidence: see `Schedule`.
        device: of the model that checks.
    """

    choose: Guesser
    process: Processors
    shape: Shape
    texts: Texts
    eos: frozenset[int]
    confidence: float
    device: torch.device


class Guesses:
    """One guess of every row of `wanted`, growing. wanted: row -> tokens at most. rows: in a pass."""

    def __init__(self, how: Chooses, wanted: Mapping[int, int], rows: int) -> None:
        self._how, self._wanted, self._rows = how, wanted, rows
        self._going_on = list(wanted)
        self.tokens: dict[int, list[int]] = {row: [] for row in wanted}
        self._drawn: dict[int, list[Tensor]] = {row: [] for row in wanted}

    def grow(self, logits: Tensor) -> list[list[int]]:
        """One more token of each guess.

        Args:
            logits: [R, V] of the guessing model, after what it was fed last.
        Returns: for every row of the pass, what to feed for the next one; no tokens at all: the guesses are complete.
        """
        sure = self._choose(logits.to(self._how.device))
        self._going_on = [row for row in sure if len(self.tokens[row]) < self._wanted[row]]
        if not self._going_on:
            return []
        going_on = set(self._going_on)
        return [self.tokens[row][-1:] if row in going_on else [] for row in range(self._rows)]

    def _choose(self, logits: Tensor) -> list[int]:
        """One more token of each row that goes on; the rows that are sure enough of it to go on after it."""
        how, sure = self._how, []
        for rows in self._together():
            indices = [len(how.texts.new[row]) + len(self.tokens[row]) for row in rows]
            if how.process.idle:
                scores = logits if len(rows) == len(logits) else logits[rows]
            else:
                scores = how.process(how.texts.before(indices[0]), logits)[0][rows]
            scores = how.shape(scores.float())
            tokens = how.choose.guess(scores, rows, indices)
            how.texts.write(rows, indices, tokens)
            sure += self._note(rows, tokens, scores)
        return sure

    def _together(self) -> Iterable[list[int]]:
        """All rows, or where processors see the text, those of one width."""
        if self._how.process.idle:
            return [self._going_on]
        groups: dict[int, list[int]] = {}
        for row in self._going_on:
            groups.setdefault(len(self._how.texts.new[row]) + len(self.tokens[row]), []).append(row)
        return groups.values()

    def _note(self, group: Sequence[int], tokens: Sequence[int], scores: Tensor) -> list[int]:
        how = self._how
        sampling = isinstance(how.choose, SpeculativeSampled)
        for row, token in zip(group, tokens, strict=True):
            self.tokens[row].append(token)
        chances = [1.0] * len(group)
        if sampling or how.confidence:
            p = probabilities(scores)
            chances = p.gather(1, torch.tensor(tokens, device=p.device)[:, None])[:, 0].tolist()
            for row, q in zip(group, p, strict=True):
                self._drawn[row].append(q)
        return [
            row
            for row, token, chance in zip(group, tokens, chances, strict=True)
            if token not in how.eos and chance >= how.confidence
        ]

    def proposals(self) -> dict[int, Proposal]:
        """What was guessed."""
        sampling = isinstance(self._how.choose, SpeculativeSampled)
        return {row: Proposal(tokens, self._drawn[row] if sampling else None) for row, tokens in self.tokens.items()}
