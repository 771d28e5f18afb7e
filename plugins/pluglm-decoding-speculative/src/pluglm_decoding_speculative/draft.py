"""The draft of an assistant with the same token ids: a smaller model with a cache of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from pluglm_decoding_blocks.feed import CachedFeed
from pluglm_decoding_blocks.prompt import Prompt
from pluglm_decoding_blocks.settings import Settings
from torch import Tensor

from pluglm.errors import ContextLengthError
from pluglm_decoding_speculative.assistant import Assistant, check_rollback
from pluglm_decoding_speculative.guessing import Chooses, Counts, Guesses, Schedule
from pluglm_decoding_speculative.passes import Passes
from pluglm_decoding_speculative.proposals import Proposal


class Draft:
    """The proposer of assisted decoding. The assistant sees the processors and warpers that the model sees.

    Args:
        limits: new tokens of each row at most.
    Raises: ContextLengthError if the assistant's context is shorter than prompt and new tokens;
        UnsupportedRequestError if its cache cannot take back.
    """

    def __init__(
        self, assistant: Assistant, prompt: Prompt, settings: Settings, limits: Sequence[int], how: Chooses,
        schedule: Schedule,
    ) -> None:  # fmt: skip
        self._how, rows = how, len(limits)
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
        feed = prefilled(assistant, prompt, settings, room)[0]
        self._passes = Passes(assistant.model, feed.cache, assistant.model.device)
        self._counts = Counts(schedule, rows)
        self._pending: list[list[int]] = [[] for _ in range(rows)]  # tokens that the assistant has not been fed
        self._guessed = [0] * rows
        self._valid = [0] * rows  # guessed tokens in its cache that turned out right
        self._cells = 0  # of the last guess, those after its first pass

    def propose(self, room: Mapping[int, int]) -> Mapping[int, Proposal]:
        """One pass over what the assistant has missed, then one a token, until no row guesses further."""
        self._settle()
        wanted = self._counts.wanted(room)
        if not wanted:
            return {}
        guesses = Guesses(self._how, wanted, len(self._pending))
        feed = guesses.grow(self._catch_up(wanted))
        while feed:
            feed = guesses.grow(self._passes.feed(feed)[:, 0])
            self._cells += 1
        for row, tokens in guesses.tokens.items():
            self._pending[row], self._guessed[row] = [], len(tokens)
        return guesses.proposals()

    def _catch_up(self, wanted: Mapping[int, int]) -> Tensor:
        """Feed what the assistant has missed; [R, V] after it."""
        fed = [tokens if row in wanted else [] for row, tokens in enumerate(self._pending)]
        logits = self._passes.feed(fed)
        if logits.shape[0] == 1:
            return logits[:, -1]
        last = torch.tensor([max(0, len(tokens) - 1) for tokens in fed], device=logits.device)
        return logits[torch.arange(len(last), device=logits.device), last]

    def learn(self, row: int, tokens: Sequence[int], matched: int) -> None:
        """Note which guessed tokens stay in the assistant's cache, and how well the guess did."""
        count = self._guessed[row]
        # The last guessed token was never fed to the assistant.
        self._valid[row] = min(matched, max(0, count - 1))
        self._pending[row] += tokens[self._valid[row] :]
        self._counts.learn(row, count, matched)
        self._guessed[row] = 0

    def _settle(self) -> None:
        """Take the guesses that failed out of the assistant's cache."""
        if self._cells:
            self._passes.take_back([self._cells - valid for valid in self._valid])
        self._cells, self._valid = 0, [0] * len(self._valid)


def prefilled(assistant: Assistant, prompt: Prompt, settings: Settings, room: int) -> tuple[CachedFeed, Tensor]:
    """The assistant's own cache, with every row's prompt, and the logits [R, V] after it. prompt: copies included."""
    device = assistant.model.device
    mask = prompt.mask.to(device) if prompt.mask is not None else None
    own = Prompt(prompt.ids.to(device), mask, prompt.lengths, prompt.last)
    feed = CachedFeed(assistant.model, own, settings.alone(), room=room, given=None, extra={})
    check_rollback(feed.cache, "assistant", "assisted")
    return feed, feed.prefill()
