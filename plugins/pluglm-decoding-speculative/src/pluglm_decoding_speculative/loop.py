"""The loop of speculative decoding: guess, run the model over the guesses of all rows at once, keep what holds.

Each row accepts a number of tokens of its own. Between two passes every token of a row but the last is in the cache, as
in plain decoding. Source: Leviathan et al. 2023, algorithm 1; Stern et al. 2018, "Blockwise parallel decoding".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from pluglm_decoding_blocks.best import most_likely
from pluglm_decoding_blocks.endings import Endings
from pluglm_decoding_blocks.failures import no_token
from pluglm_decoding_blocks.feed import CachedFeed
from pluglm_decoding_blocks.processors import Processors, known_best
from pluglm_decoding_blocks.prompt import Prompt
from pluglm_decoding_blocks.settings import Settings
from torch import Tensor

from pluglm.contracts import GenerationOutput, StoppingCriterion, Streamer
from pluglm_decoding_speculative.choosing import Chooser, Greedy
from pluglm_decoding_speculative.passes import Passes
from pluglm_decoding_speculative.proposals import NOTHING, Proposal, Proposer

#: Scores [n, V] of any rows at any places -> scores; what reshapes them without looking at the text.
Shape = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Statistics:
    """What speculation gave. passes: of the model, prefill aside. guessed, accepted: tokens, of all rows together."""

    passes: int
    guessed: int
    accepted: int


@dataclass(frozen=True)
class Job:
    """One call, read and checked.

    Attributes:
        prompt: one row a sequence to be made (copies included). limits: new tokens of each row at most.
        feed: runs the prompt; its cache serves all passes. process: not incremental. shape: what comes after it.
        criteria: the caller's. decode: for stop strings.
    """

    settings: Settings
    prompt: Prompt
    limits: tuple[int, ...]
    feed: CachedFeed
    passes: Passes
    process: Processors
    shape: Shape
    choose: Chooser
    criteria: Sequence[StoppingCriterion]
    streamer: Streamer | None
    decode: Callable[[Sequence[int]], str] | None
    texts: Texts


class Texts:
    """What is there so far: each row's new tokens, and all of it as a tensor for those who must see it.

    Args:
        wanted: keep the tensor up to date.

    Attributes:
        new: the new tokens of each row. ids: [R, S + most] int64; what a row has not reached yet may hold anything.
    """

    def __init__(self, prompt: Prompt, most: int, pad: int, *, wanted: bool) -> None:
        self.width, self._pad, self._wanted = prompt.width, pad, wanted
        self.new: list[list[int]] = [[] for _ in prompt.lengths]
        self._prompt = prompt.ids
        self.ids = prompt.ids
        if wanted:
            self.ids = torch.full((len(self.new), self.width + most), pad, device=prompt.ids.device)
            self.ids[:, : self.width] = prompt.ids

    def write(self, rows: Sequence[int], indices: Sequence[int], tokens: Sequence[int]) -> None:
        """New token indices[i] of each of `rows`, on trial."""
        if self._wanted:
            columns = [self.width + index for index in indices]
            self.ids[list(rows), columns] = torch.tensor(tokens, device=self.ids.device)

    def before(self, index: int) -> Tensor:
        """[R, S + index]: what stands before new token `index`."""
        return self.ids[:, : self.width + index]

    def column(self, index: int) -> Tensor:
        """[R] new token `index` of every row, -1 where a row ended before."""
        row_tokens = [row[index] if index < len(row) else -1 for row in self.new]
        return torch.tensor(row_tokens, device=self._prompt.device)

    def sequences(self) -> Tensor:
        """[R, S + the most new tokens of a row]."""
        most = max(map(len, self.new))
        new = [[*row, *[self._pad] * (most - len(row))] for row in self.new]
        made = torch.tensor(new, dtype=torch.int64, device=self._prompt.device).view(len(new), most)
        return torch.cat((self._prompt, made), dim=1)


@dataclass
class Run:
    """A job under way. Attributes: alive: rows that go on. sent: columns that the streamer has been given."""

    job: Job
    endings: Endings
    alive: list[int]
    logprobs: list[list[float]]
    sent: int = 0
    decided: list[int] = field(default_factory=list)

    def room(self) -> dict[int, int]:
        """Row -> tokens that may be guessed for it.

        No more than it may still have: the last one is the model's own. And where the cache has a capacity, no row may
        use up cells that another one needs to reach its limit by one token a pass.
        """
        left = {row: self.job.limits[row] - self.endings.counts[row] for row in self.alive}
        cache = self.job.passes.cache
        if cache.capacity is None:
            return {row: count - 1 for row, count in left.items()}
        cells = cache.capacity - cache.length
        room = {}
        for row, count in left.items():
            others = max((other for r, other in left.items() if r != row), default=1)
            room[row] = max(0, min(count - 1, cells - others))
        return room

    def decide(self, logits: Tensor, proposals: Mapping[int, Proposal]) -> dict[int, list[int]]:
        """Choose tokens for as long as guesses hold; what each row that was going on has got.

        Args:
            logits: [R, T, V] after a row's last token and each of its guesses.
        """
        before = {row: len(self.job.texts.new[row]) for row in self.alive}
        walking, at = self.alive, 0
        known = self._all_at_once(logits)
        while walking:
            going_on: list[int] = []
            for rows in self._together(walking):
                guesses = [proposals.get(row, NOTHING) for row in rows]
                tokens, done = self._column(logits, at, rows, guesses, known)
                self._note_logprobs(logits, at, rows, tokens)
                for row, token, guess, stop in zip(rows, tokens, guesses, done, strict=True):
                    self.job.texts.new[row].append(token)
                    ends = self.endings.push(row, token, done=stop)
                    if ends:
                        self.alive = [r for r in self.alive if r != row]
                    elif at < len(guess.tokens) and guess.tokens[at] == token:
                        going_on.append(row)
            walking, at = going_on, at + 1
        return {row: self.job.texts.new[row][count:] for row, count in before.items()}

    def _together(self, rows: list[int]) -> Iterable[list[int]]:
        """Rows whose next tokens are chosen in one go: all, or where somebody sees the text, those of one width.

        Rows of a batch that guesses soon have all different lengths, and a choice costs its calls more than its rows.
        """
        if self.job.process.idle and not self.job.criteria:
            return [rows]
        groups: dict[int, list[int]] = {}
        for row in rows:
            groups.setdefault(len(self.job.texts.new[row]), []).append(row)
        return groups.values()

    def _all_at_once(self, logits: Tensor) -> tuple[list[list[int]], list[list[float]]] | None:
        """Tokens and best scores [R][T], where they depend on nothing but the logits."""
        if not (isinstance(self.job.choose, Greedy) and self.job.process.idle and not self.job.criteria):
            return None
        best, tokens = most_likely(logits)
        return tokens.tolist(), best.tolist()

    def _column(
        self, logits: Tensor, at: int, rows: list[int], guesses: Sequence[Proposal],
        known: tuple[list[list[int]], list[list[float]]] | None,
    ) -> tuple[list[int], list[bool]]:  # fmt: skip
        """The next token of each of `rows`, and whether a criterion of the caller's ends the row with it."""
        job = self.job
        indices = [len(job.texts.new[row]) for row in rows]
        if known is not None:
            tokens, best = ([values[row][at] for row in rows] for values in known)
            _require_finite(rows, best, indices)
            return [int(token) for token in tokens], [False] * len(rows)
        # The caller's own see every row, so that theirs keep their numbers; what comes out of others is not used.
        whole = not job.process.idle or bool(job.criteria)
        scores, raw = job.process(job.texts.before(indices[0]), logits[:, at] if whole else logits[rows, at])
        scores = job.shape(scores.float())
        best_scores = known_best(scores.amax(-1), raw)
        if whole:
            best_scores = best_scores[rows]
        _require_finite(rows, best_scores.tolist(), indices)
        tried = [_guess(guess, at) for guess in guesses]
        chosen = job.choose.choose(scores[rows] if whole else scores, rows, indices, tried)
        job.texts.write(rows, indices, chosen)
        return chosen, self._done(scores, indices[0], rows)

    def _done(self, scores: Tensor, index: int, rows: Sequence[int]) -> list[bool]:
        done = [False] * len(rows)
        for criterion in self.job.criteria:
            ends = criterion(self.job.texts.before(index + 1), scores).tolist()
            done = [one or bool(ends[row]) for one, row in zip(done, rows, strict=True)]
        return done

    def _note_logprobs(self, logits: Tensor, at: int, rows: Sequence[int], tokens: Sequence[int]) -> None:
        """Of the model itself, before processors and temperature, float32."""
        if not self.job.settings.logprobs:
            return
        wide = logits[list(rows), at].float()
        chosen = wide.gather(1, torch.tensor(tokens, device=wide.device)[:, None])[:, 0]
        for row, value in zip(rows, (chosen - wide.logsumexp(-1)).tolist(), strict=True):
            self.logprobs[row].append(value)

    def stream(self) -> None:
        """Send the columns that every row has, or will never have."""
        if self.job.streamer is None:
            return
        counts = self.endings.counts
        until = min(counts[row] for row in self.alive) if self.alive else max(counts)
        for index in range(self.sent, until):
            self.job.streamer.put(self.job.texts.column(index))
        self.sent = max(self.sent, until)


def run(job: Job, proposer: Proposer) -> tuple[GenerationOutput, Statistics]:
    """Generate."""
    R = len(job.limits)
    endings = Endings(job.settings, job.limits, job.decode)
    state = Run(job, endings, [row for row in range(R) if job.limits[row]], [[] for _ in range(R)])
    passes = guessed = accepted = 0
    if state.alive:
        for row, tokens in state.decide(job.feed.prefill()[:, None], {}).items():
            proposer.learn(row, tokens, 0)
        state.stream()
    while state.alive:
        proposals = proposer.propose(state.room())
        alive = set(state.alive)
        fed = [
            [job.texts.new[row][-1], *proposals.get(row, NOTHING).tokens] if row in alive else [] for row in range(R)
        ]
        got = state.decide(job.passes.feed(fed), proposals)
        _keep(job.passes, max(map(len, fed)), {row: len(tokens) for row, tokens in got.items()}, R)
        passes += 1
        for row, tokens in got.items():
            guess = proposals.get(row, NOTHING).tokens
            matched = next((i for i, (a, b) in enumerate(zip(guess, tokens, strict=False)) if a != b), None)
            matched = min(len(guess), len(tokens)) if matched is None else matched
            guessed, accepted = guessed + len(guess), accepted + matched
            proposer.learn(row, tokens, matched)
        state.stream()
    _align(job)
    counts = tuple(endings.counts)
    logprobs = tuple(map(tuple, state.logprobs)) if job.settings.logprobs else None
    output = GenerationOutput(
        job.texts.sequences(), job.prompt.width, counts, tuple(endings.reasons), logprobs
    )  # fmt: skip
    return output, Statistics(passes, guessed, accepted)


def _keep(passes: Passes, width: int, kept: Mapping[int, int], rows: int) -> None:
    """After a pass of `width` cells: each row keeps as many as it got tokens. Rows that had ended hold padding only."""
    most = max(kept.values())
    passes.take_back([width - kept.get(row, most) for row in range(rows)])


def _align(job: Job) -> None:
    """Leave a caller's cache of several rows as plain decoding does: cell S + i holds new token i, or a hole.

    Rows that went ahead by different numbers left holes in between. The new tokens are fed once more, in one pass.
    """
    most = max(map(len, job.texts.new))
    if not job.feed.given or len(job.limits) == 1 or most < 2:
        return
    job.passes.cache.crop(job.prompt.width)
    job.passes.feed([row[: most - 1] for row in job.texts.new], keep=1)


def _guess(proposal: Proposal, at: int) -> tuple[int, Tensor | None] | None:
    if at >= len(proposal.tokens):
        return None
    return proposal.tokens[at], proposal.drawn_from[at] if proposal.drawn_from is not None else None


def _require_finite(rows: Sequence[int], best: Sequence[float], indices: Sequence[int]) -> None:
    failed = {row: value for row, value in zip(rows, best, strict=True) if not math.isfinite(value)}
    if failed:
        raise no_token(failed, min(index for row, index in zip(rows, indices, strict=True) if row in failed))
