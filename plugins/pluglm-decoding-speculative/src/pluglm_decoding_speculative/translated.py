"""The draft of an assistant with another tokenizer ("universal assisted generation"): its text is the guess.

Source: Timor et al. 2025, section 3.1, as in `spelling`. The model checks ids of its own: a guess holds where the model
chooses the same ids, so the tokens are those of plain greedy decoding, or of plain sampling with the same seed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from pluglm_decoding_blocks.prompt import Prompt
from pluglm_decoding_blocks.settings import Settings

from pluglm.contracts import Cache
from pluglm.errors import ContextLengthError
from pluglm_decoding_speculative.assistant import Assistant
from pluglm_decoding_speculative.draft import prefilled
from pluglm_decoding_speculative.guessing import Counts, Schedule
from pluglm_decoding_speculative.passes import Passes
from pluglm_decoding_speculative.proposals import Proposal
from pluglm_decoding_speculative.spelling import Bilingual, Spelling


@dataclass(frozen=True)
class Lookbehind:
    """Tokens before a border that are spelt anew: of the model's text (target), of the assistant's."""

    target: int = 10
    assistant: int = 10


class Books:
    """Which cells of a cache hold which of a row's tokens, so that any number of tokens can be taken back.

    A cell is a token of the row or a hole; the last token's cell need not be the last cell.
    """

    def __init__(self, rows: Sequence[Sequence[int]], passes: Passes) -> None:
        width = max(map(len, rows))
        self.tokens = [list(row) for row in rows]
        self._cells = [[False] * (width - len(row)) + [True] * len(row) for row in rows]
        self._passes = passes

    def feed(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """One pass; logits [R, V] after each row's last token."""
        width = max(map(len, rows))
        logits = self._passes.feed(rows)
        for row, tokens in enumerate(rows):
            self.tokens[row] += tokens
            self._cells[row] += [True] * len(tokens) + [False] * (width - len(tokens))
        last = torch.tensor([max(0, len(tokens) - 1) for tokens in rows], device=logits.device)
        return logits[torch.arange(len(rows), device=logits.device), last]

    def keep(self, counts: Sequence[int]) -> None:
        """Each row keeps its first `counts[row]` tokens."""
        gone = [self._end(row, len(self.tokens[row]) - count) for row, count in enumerate(counts)]
        if not any(gone):
            return
        self._passes.take_back(gone)
        for row, count in enumerate(gone):
            cells = self._cells[row]
            cells[len(cells) - count :] = [False] * count
            del self.tokens[row][counts[row] :]
            del cells[len(cells) - min(gone) :]

    def _end(self, row: int, count: int) -> int:
        """Cells at the end of a row that hold its last `count` tokens. Holes behind the last one need not go."""
        cells = self._cells[row]
        seen = end = 0
        while seen < count:
            end += 1
            seen += cells[-end]
        return end


class Translated:
    """The proposer of assisted decoding with another tokenizer. The assistant takes its most likely token, always.

    Whatever it guesses, what the model chooses is exact; processors and warpers speak of the model's ids, so it is not
    shown them. A row whose text has outgrown the assistant's context goes on without guesses.

    Args:
        texts: real tokens of each row's prompt. limits: new tokens of each row at most.
    Raises: ContextLengthError if the assistant's context holds no prompt; UnsupportedRequestError if its cache cannot
        take back.
    """

    def __init__(
        self, assistant: Assistant, model: Spelling, texts: Sequence[Sequence[int]], settings: Settings,
        limits: Sequence[int], schedule: Schedule, lookbehind: Lookbehind,
    ) -> None:  # fmt: skip
        assert assistant.spelling is not None  # `read_assistant` has looked
        self._assistant, self._settings, self._schedule = assistant, settings, schedule
        self._limit = assistant.max_seq_len
        self._rows = [
            Bilingual(
                text, model, assistant.spelling, start=assistant.start, model_lookbehind=lookbehind.target,
                assistant_lookbehind=lookbehind.assistant,
            )
            for text in texts
        ]  # fmt: skip
        longest = max(len(row.ids) for row in self._rows)
        if self._limit is not None and longest > self._limit:
            raise ContextLengthError(
                f"the prompt is {longest} tokens of the assistant's, and its context holds {self._limit}.",
                fix="Use an assistant of a longer context, or name another strategy.",
                tokens=longest, limit=self._limit,
            )  # fmt: skip
        self._counts = Counts(schedule, len(texts))
        self._guessed: list[list[int]] = [[] for _ in texts]
        self._spare = 0
        # The assistant's spelling may be longer than the model's: where cells run out, the text is read in anew.
        self._books, self._cache = self._read(range(len(texts)), max(limits) + 2 * schedule.count)

    def _read(self, alive: Sequence[int], spare: int) -> tuple[Books, Cache]:
        """A cache with what `alive` rows hold but their last token, and `spare` cells at least behind it."""
        # A row needs a token; one that is not of its text is taken back before it is guessed from.
        rows = [(row.ids[:-1] if at in alive else []) or [0] for at, row in enumerate(self._rows)]
        width = max(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        prompt = Prompt(ids, None if mask.all() else mask, tuple(map(len, rows)), (width - 1,) * len(rows))
        self._spare = max(self._spare, spare)
        feed, _ = prefilled(self._assistant, prompt, self._settings, width + self._spare)
        return Books(rows, Passes(self._assistant.model, feed.cache, self._assistant.model.device)), feed.cache

    def propose(self, room: Mapping[int, int]) -> Mapping[int, Proposal]:
        """One pass over what the assistant has missed, then one a token; then the guesses' text in the model's ids."""
        wanted = self._wanted(room)
        if not wanted:
            return {}
        rows = range(len(self._rows))
        self._take_back(wanted)
        missed = max(len(self._rows[row].ids) - len(self._books.tokens[row]) for row in wanted)
        if not self._fits(missed + max(wanted.values())):
            self._books, self._cache = self._read(list(wanted), 1 + max(wanted.values()))
            self._take_back(wanted)
        guesses: dict[int, list[int]] = {row: [] for row in wanted}
        feed = [self._rows[row].ids[len(self._books.tokens[row]) :] if row in wanted else [] for row in rows]
        while any(feed):
            going_on = self._grow(self._books.feed(feed), [row for row in rows if feed[row]], guesses, wanted)
            feed = [guesses[row][-1:] if row in going_on else [] for row in rows]
        proposals = {}
        for row, guess in guesses.items():
            tokens = self._rows[row].back(guess)[: room[row]]
            self._guessed[row] = tokens
            if tokens:
                proposals[row] = Proposal(tokens)
        return proposals

    def _wanted(self, room: Mapping[int, int]) -> dict[int, int]:
        """Row -> tokens of the assistant's to guess."""
        wanted = {row: count for row, count in self._counts.wanted(room).items() if self._rows[row].ids}
        if self._limit is None:
            return wanted
        left = {row: self._limit - len(self._rows[row].ids) for row in wanted}
        return {row: min(count, left[row]) for row, count in wanted.items() if left[row] > 0}

    def _fits(self, cells: int) -> bool:
        return self._cache.capacity is None or self._cache.length + cells <= self._cache.capacity

    def _take_back(self, wanted: Mapping[int, int]) -> None:
        """Take out of the cache what is no longer so, and the last token, after which the first guess comes."""
        counts = []
        for row, fed in enumerate(self._books.tokens):
            ids = self._rows[row].ids
            same = next((i for i, (a, b) in enumerate(zip(fed, ids, strict=False)) if a != b), min(len(fed), len(ids)))
            counts.append(min(same, len(ids) - 1) if row in wanted else len(fed))
        self._books.keep(counts)

    def _grow(
        self, logits: torch.Tensor, rows: Sequence[int], guesses: Mapping[int, list[int]], wanted: Mapping[int, int]
    ) -> set[int]:
        """One more token of each guess; the rows that go on. logits: [R, V]."""
        p, tokens = logits.float().softmax(-1).max(-1)
        chances, best, going_on = p.tolist(), tokens.tolist(), set()
        for row in rows:
            if best[row] in self._assistant.ends:
                continue  # an end has no text
            guesses[row].append(best[row])
            if len(guesses[row]) < wanted[row] and chances[row] >= self._schedule.confidence:
                going_on.add(row)
        return going_on

    def learn(self, row: int, tokens: Sequence[int], matched: int) -> None:
        """Spell what the model wrote, and note how well the guess did."""
        self._rows[row].extend(tokens)
        self._counts.learn(row, len(self._guessed[row]), matched)
        self._guessed[row] = []
