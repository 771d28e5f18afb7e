"""Guesses of what comes next, and the protocol of what makes them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Proposal:
    """One row's guess.

    Attributes:
        tokens: in order. drawn_from: for each of them the distribution [V] float64 that it was drawn from, on the
            device of the model's logits; None: it was not drawn but is simply this token.
    """

    tokens: Sequence[int] = ()
    drawn_from: Sequence[Tensor] | None = None


#: What a row without a guess has: its step is a plain one.
NOTHING = Proposal()


class Proposer(Protocol):
    """Guesses for every row, from nothing but this row's own text and its luck so far."""

    def propose(self, room: Mapping[int, int]) -> Mapping[int, Proposal]:
        """Guesses of the rows that have one. room: row -> tokens at most, for every row that goes on."""
        ...

    def learn(self, row: int, tokens: Sequence[int], matched: int) -> None:
        """What the model made of a row's last guess: its next tokens, of which the first `matched` had been guessed."""
        ...


class NoGuesses:
    """Every step is a plain one."""

    def propose(self, room: Mapping[int, int]) -> Mapping[int, Proposal]:
        """None."""
        return {}

    def learn(self, row: int, tokens: Sequence[int], matched: int) -> None:
        """Nothing."""
