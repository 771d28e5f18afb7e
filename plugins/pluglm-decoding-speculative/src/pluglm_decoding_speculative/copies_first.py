"""Two kinds of guesses: what the text itself says, where that is likely to hold, else an assistant's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pluglm_decoding_speculative.lookup import Lookup
from pluglm_decoding_speculative.proposals import Proposal, Proposer

#: A copied guess that is as likely to hold is taken: it costs no pass of the assistant, which is right about as often.
LIKELY = 0.5


class CopiesFirst:
    """Copies are looked up for every row; the assistant guesses for the rows that have no likely one.

    What a row may copy is learnt from all of its text, also where the assistant guessed.
    """

    def __init__(self, lookup: Lookup, assistant: Proposer) -> None:
        self._lookup, self._assistant = lookup, assistant

    def propose(self, room: Mapping[int, int]) -> Mapping[int, Proposal]:
        """See `Proposer.propose`."""
        copied = {
            row: proposal for row, proposal in self._lookup.propose(room).items() if self._lookup.chance(row) >= LIKELY
        }
        guessed = self._assistant.propose({row: most for row, most in room.items() if row not in copied})
        return {**guessed, **copied}

    def learn(self, row: int, tokens: Sequence[int], matched: int) -> None:
        """Both do."""
        self._lookup.learn(row, tokens, matched)
        self._assistant.learn(row, tokens, matched)
