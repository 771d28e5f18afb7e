"""Prompt lookup: what followed the last tokens when they occurred before is the guess.

Source: Saxena 2023, "Prompt Lookup Decoding"; names and defaults as in transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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

    A row's guesses are as long as `count` allows while they hold. After one that failed the next has at most twice as
    many tokens as the model just made: so a text that never repeats itself costs short passes.

    Args:
        texts: the real tokens of each row's prompt. count: tokens of a guess at most. longest: of the runs looked for.
    """

    def __init__(self, texts: Sequence[Sequence[int]], *, count: int, longest: int, eos: Sequence[int]) -> None:
        self._rows = [NgramIndex(text, longest) for text in texts]
        self._count = count
        self._reach = [count] * len(texts)
        self._guessed = [0] * len(texts)
        self._eos = frozenset(eos)

    def propose(self, room: Mapping[int, int]) -> Mapping[int, Proposal]:
        """One search a row."""
        proposals = {}
        for row, most in room.items():
            tokens = self._rows[row].continuation(min(most, self._reach[row])) if most > 0 else []
            for at, token in enumerate(tokens):
                if token in self._eos:  # nothing follows an end
                    del tokens[at + 1 :]
                    break
            self._guessed[row] = len(tokens)
            if tokens:
                proposals[row] = Proposal(tokens)
        return proposals

    def learn(self, row: int, tokens: Sequence[int], matched: int) -> None:
        """Index the row's new tokens."""
        self._rows[row].extend(tokens)
        if self._guessed[row]:
            self._reach[row] = self._count if matched == self._guessed[row] else min(self._count, 2 * len(tokens))
            self._guessed[row] = 0
