"""Prompt lookup: what followed the last tokens when they occurred before is the guess.

Source: Saxena 2023, "Prompt Lookup Decoding"; names and defaults as in transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pluglm_decoding_speculative.pace import FIRST_MARGIN, MARGIN, Luck, late, reach
from pluglm_decoding_speculative.proposals import Proposal


class NgramIndex:
    """Where each run of 1 to `longest` tokens occurred last, kept up to date token by token.

    On the host, a few dictionary look-ups a token: a search that finds nothing must cost nothing next to a forward
    pass.
    """

    def __init__(self, tokens: Sequence[int], longest: int) -> None:
        self._tokens: list[int] = []
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in range(longest)]
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """The text goes on. Only now do its last runs have something that follows them."""
        text = self._tokens
        for token in tokens:
            end = len(text)
            for size, after in enumerate(self._after[:end], 1):
                after[tuple(text[end - size :])] = end
            text.append(token)

    def continuation(self, count: int) -> list[int]:
        """`count` tokens that followed the last occurrence of the longest run that the text ends with; [] if none did.

        Where they reach the end of the text they go on with themselves, so that a repetition is continued however
        short its period is.
        """
        text = self._tokens
        for size in range(min(len(self._after), len(text)), 0, -1):
            start = self._after[size - 1].get(tuple(text[len(text) - size :]))
            if start is not None:
                period = len(text) - start
                return [text[start + i % period] for i in range(count)]
        return []


class Lookup:
    """The proposer of prompt lookup.

    What follows the row's last tokens is looked up for every row; how much of it is guessed, `pace` says.

    Args:
        texts: the real tokens of each row's prompt. count: tokens of a guess at most. longest: of the runs looked for.
        price: of a cell, see `pace`.
    """

    def __init__(
        self, texts: Sequence[Sequence[int]], *, count: int, longest: int, eos: Sequence[int], price: float
    ) -> None:  # fmt: skip
        self._rows = [NgramIndex(text, longest) for text in texts]
        self._count, self._price = count, price
        self._luck = [Luck() for _ in texts]
        self._found: list[list[int]] = [[] for _ in texts]
        self._eos = frozenset(eos)
        self._margin = MARGIN if len(texts) == 1 else FIRST_MARGIN

    def propose(self, room: Mapping[int, int]) -> Mapping[int, Proposal]:
        """One search a row."""
        for row, most in room.items():
            self._found[row] = self._search(row, min(most, self._count))
        found = {row: tokens for row in room if (tokens := self._found[row])}
        if not found:
            return {}
        most = reach(found, self._luck, self._price, late(room), self._margin)
        if not most:
            return {}
        self._margin = MARGIN  # from now on there are holes
        return {row: Proposal(tokens[:most]) for row, tokens in found.items()}

    def chance(self, row: int) -> float:
        """How likely the first token of the row's guess is right, by how such guesses went before."""
        return self._luck[row].first

    def _search(self, row: int, count: int) -> list[int]:
        tokens = self._rows[row].continuation(count) if count > 0 else []
        for at, token in enumerate(tokens):
            if token in self._eos:  # nothing follows an end
                return tokens[: at + 1]
        return tokens

    def learn(self, row: int, tokens: Sequence[int], matched: int) -> None:
        """Index the row's new tokens."""
        self._rows[row].extend(tokens)
        self._luck[row].learn(self._found[row], tokens)
        self._found[row] = []
