"""Guesses of an assistant, for all rows of a ragged batch at once.

Source: Leviathan et al. 2023, section 2; names of the settings as in transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from pluglm_decoding_blocks.feed import CachedFeed
from pluglm_decoding_blocks.processors import Processors
from pluglm_decoding_blocks.prompt import Prompt
from pluglm_decoding_blocks.settings import Settings
from torch import Tensor

from pluglm.errors import ContextLengthError
from pluglm_decoding_speculative.assistant import Assistant, check_rollback
from pluglm_decoding_speculative.choosing import Guesser, SpeculativeSampled, probabilities
from pluglm_decoding_speculative.loop import Texts
from pluglm_decoding_speculative.passes import Passes
from pluglm_decoding_speculative.proposals import Proposal


@dataclass(frozen=True)
class Schedule:
    """How far an assistant guesses ahead.

    Attributes:
        count: tokens of a guess, at first. adaptive: two more after a guess that held wholly, else one less.
        confidence: a guess ends with the token to which the assistant gives less probability; 0: never so.
    """

    count: int = 20
    adaptive: bool = False
    confidence: float = 0.4


class Draft:
    """The proposer of assisted decoding. The assistant sees the processors and warpers that the model sees.

    Args:
        limits: new tokens of each row at most. texts: what the rows have so far; guesses are tried on in its tensor.
    Raises: ContextLengthError if the assistant's context is shorter than prompt and new tokens;
        UnsupportedRequestError if its cache cannot take back.
    """

    def __init__(
        self, assistant: Assistant, prompt: Prompt, settings: Settings, limits: Sequence[int], choose: Guesser,
        process: Processors, texts: Texts, schedule: Schedule,
    ) -> None:  # fmt: skip
        self._settings, self._choose, self._process, self._texts = settings, choose, process, texts
        self._schedule, self._device = schedule, prompt.ids.device
        rows = len(limits)
        # The last new token follows from the one before, which need not be guessed from.
        tokens = max(length + limit for length, limit in zip(prompt.lengths, limits, strict=True)) - 1
        if assistant.max_seq_len is not None and tokens > assistant.max_seq_len:
            raise ContextLengthError(
                f"prompt and new tokens are {tokens}, and the assistant's context holds {assistant.max_seq_len}.",
                fix="Use an assistant of a longer context, ask for fewer tokens, or name another strategy.",
                tokens=tokens, limit=assistant.max_seq_len,
            )  # fmt: skip
        # Holes: each kept cell holds a token of some row. On top of them one guess of full length.
        room = prompt.width + sum(limits) + (max(limits) if rows > 1 else 0)
        self._eos = frozenset(settings.eos)
        self._feed = _prefilled(assistant, prompt, settings, room)
        self._passes = Passes(assistant.model, self._feed.cache, assistant.model.device)
        self._count = [schedule.count] * rows
        self._pending: list[list[int]] = [[] for _ in range(rows)]  # tokens that the assistant has not been fed
        self._guessed = [0] * rows
        self._valid = [0] * rows  # guessed tokens in its cache that turned out right
        self._cells = 0  # of the last guess, those after its first pass

    def propose(self, room: Mapping[int, int]) -> Mapping[int, Proposal]:
        """One pass over what the assistant has missed, then one a token, until no row guesses further."""
        self._settle()
        wanted = {row: count for row, most in room.items() if (count := min(most, self._count[row])) > 0}
        if not wanted:
            return {}
        rows = range(len(self._pending))
        logits = self._passes.feed([self._pending[row] if row in wanted else [] for row in rows])
        last = torch.tensor([max(0, len(tokens) - 1) for tokens in self._pending]).clamp_(max=logits.shape[1] - 1)
        scores = logits[torch.arange(len(last)), last]  # [R, V]
        guesses: dict[int, list[int]] = {row: [] for row in wanted}
        drawn: dict[int, list[Tensor]] = {row: [] for row in wanted}
        going_on = list(wanted)
        while True:
            going_on = [
                row for row in self._guess(scores.to(self._device), going_on, guesses, drawn)
                if len(guesses[row]) < wanted[row]
            ]  # fmt: skip
            if not going_on:
                break
            scores = self._passes.feed([guesses[row][-1:] if row in going_on else [] for row in rows])[:, 0]
            self._cells += 1
        for row in wanted:
            self._pending[row], self._guessed[row] = [], len(guesses[row])
        sampling = isinstance(self._choose, SpeculativeSampled)
        return {row: Proposal(tokens, drawn[row] if sampling else None) for row, tokens in guesses.items()}

    def _guess(
        self, logits: Tensor, rows: Sequence[int], guesses: Mapping[int, list[int]], drawn: Mapping[int, list[Tensor]]
    ) -> list[int]:
        """One more token of each row's guess; the rows that are sure enough of it to go on. logits: [R, V]."""
        going_on = []
        groups: dict[int, list[int]] = {}
        for row in rows:
            groups.setdefault(len(self._texts.new[row]) + len(guesses[row]), []).append(row)
        for index, group in groups.items():
            if self._process.idle:
                scores = logits[group]
            else:
                scores = self._process(self._texts.before(index), logits)[0][group]
            scores = self._choose.shape(scores.float())
            tokens = self._choose.guess(scores, group, index)
            self._texts.write(group, index, tokens)
            p = probabilities(scores)
            sure = p.gather(1, torch.tensor(tokens, device=p.device)[:, None])[:, 0].tolist()
            for row, token, q, chance in zip(group, tokens, p, sure, strict=True):
                guesses[row].append(token)
                drawn[row].append(q)
                if token not in self._eos and chance >= self._schedule.confidence:
                    going_on.append(row)
        return going_on

    def learn(self, row: int, tokens: Sequence[int], matched: int) -> None:
        """Note which guessed tokens stay in the assistant's cache, and how well the guess did."""
        count = self._guessed[row]
        # The last guessed token was never fed to the assistant.
        self._valid[row] = min(matched, max(0, count - 1))
        self._pending[row] += tokens[self._valid[row] :]
        if count and self._schedule.adaptive:
            self._count[row] = self._count[row] + 2 if matched == count else max(1, self._count[row] - 1)
        self._guessed[row] = 0

    def _settle(self) -> None:
        """Take the guesses that failed out of the assistant's cache."""
        if self._cells:
            self._passes.take_back([self._cells - valid for valid in self._valid])
        self._cells, self._valid = 0, [0] * len(self._valid)


def _prefilled(assistant: Assistant, prompt: Prompt, settings: Settings, room: int) -> CachedFeed:
    """The assistant's own cache, with every row's prompt. prompt: copies included."""
    device = assistant.model.device
    mask = prompt.mask.to(device) if prompt.mask is not None else None
    own = Prompt(prompt.ids.to(device), mask, prompt.lengths, prompt.last)
    feed = CachedFeed(assistant.model, own, settings.alone(), room=room, given=None, extra={})
    check_rollback(feed.cache, "assistant", "assisted")
    feed.prefill()
    return feed
