"""The loop of all searches of a call: one pass for all beams, then each search goes one token on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from pluglm_decoding_blocks.failures import no_token
from pluglm_decoding_blocks.processors import Processors, known_best
from pluglm_decoding_blocks.prompt import Prompt
from pluglm_decoding_blocks.settings import Settings
from torch import Tensor

from pluglm.contracts import FinishReason, GenerationOutput
from pluglm.errors import GenerationError
from pluglm_decoding_beam.beam_feed import BeamFeed
from pluglm_decoding_beam.beam_settings import BeamSettings
from pluglm_decoding_beam.ends import Ends
from pluglm_decoding_beam.hypotheses import NOBODY, Beam, Ended, Search
from pluglm_decoding_beam.picking import Pick


@dataclass(frozen=True)
class BeamOutput(GenerationOutput):
    """What a beam search returns: rows of one prompt best first.

    Attributes:
        sequence_scores: of each row: the sum of its tokens' processed scores / (new tokens) ** length_penalty.
    """

    sequence_scores: tuple[float, ...] = ()


@dataclass(frozen=True)
class Job:
    """One call, read and checked.

    Attributes:
        prompt: one row a prompt. limits: new tokens of each prompt's hypotheses at most.
        warp: reshapes processed scores [R, V] before they are added up.
    """

    settings: Settings
    beams: BeamSettings
    prompt: Prompt
    limits: tuple[int, ...]
    feed: BeamFeed
    process: Processors
    warp: Callable[[Tensor], Tensor]
    pick: Pick
    ends: Ends


def run(job: Job) -> BeamOutput:
    """Search until no search can improve. Row (b, g, w) of the batch belongs to beam w of group g of prompt b."""
    most = max(job.limits)
    searches = [[Search(job.beams, limit) for _ in range(job.beams.groups)] for limit in job.limits]
    sequences = job.prompt.ids.repeat_interleave(job.beams.beams, 0)  # [R, S]
    logits = job.feed.prefill() if most else None
    for count in range(most):
        assert logits is not None
        step = _Step(job, searches, sequences, logits, count)
        for group in range(job.beams.groups):
            step.advance(group)
        if count + 1 == most or all(search.done for row in searches for search in row):
            break
        source, tokens = _moves(searches, job.settings.pad)
        kept = sequences[torch.tensor(source, device=sequences.device)]
        sequences = torch.cat((kept, torch.tensor(tokens, device=sequences.device)[:, None]), dim=1)
        logits = job.feed.step(sequences, source)
    output = _output(job, [_best(job, row, number) for number, row in enumerate(searches)])
    if most:
        job.feed.give(output.sequences, output.num_new_tokens, job.settings.copies)
    return output


class _Step:
    """One token of every search, group after group, from the logits of one pass.

    Args:
        searches: [B][G]. sequences: [R, S]. logits: [R, V]. count: new tokens so far.
    """

    def __init__(
        self, job: Job, searches: Sequence[Sequence[Search]], sequences: Tensor, logits: Tensor, count: int
    ) -> None:
        self._job, self._searches, self._count = job, searches, count
        B, G, W, V = len(searches), job.beams.groups, job.beams.width, logits.shape[-1]
        logprobs = logits.float().log_softmax(-1)
        scores, raw = job.process(sequences, logprobs)
        self._logprobs = logprobs.view(B, G, W, V)
        self._scores = job.warp(scores).view(B, G, W, V)
        self._raw = raw.view(B, G, W) if raw is not None else None
        self._sequences = sequences.view(B, G, W, -1)
        # A beam has one token for each way to end and one to go on with, at least.
        self._picked = min(max(2, 1 + len(job.settings.eos)) * W, W * V)
        self._chosen = torch.zeros(B, V, device=logits.device) if G > 1 else None

    def advance(self, group: int) -> None:
        """Let every search of this group go one token on. Raises if one of them has no finite score to go on with."""
        searches = [row[group] for row in self._searches]
        best, candidates = self._picks(group, searches)
        going_on = [i for i, search in enumerate(searches) if not search.done]
        failed = {i: best[i] for i in going_on if not math.isfinite(best[i])}
        if failed:
            raise no_token(failed, self._count)
        taken: list[tuple[int, int]] = []
        for i in going_on:
            ending = [(beam, self._reason(i, beam, asked)) for beam, asked in candidates[i]]
            searches[i].take(ending)
            # Those that go on, or would if there were room: later groups shall not keep away from an end token.
            kept = [beam.token for beam, reason in ending if reason in (None, "length")][: self._job.beams.width]
            taken += [(i, token) for token in kept]
        if self._chosen is not None and taken:
            at = tuple(torch.tensor(taken, device=self._chosen.device).T)
            self._chosen.index_put_(at, self._chosen.new_ones(len(taken)), accumulate=True)

    def _reason(self, row: int, beam: Beam, asked: bool) -> FinishReason | None:
        return self._job.ends.reason(beam, self._count + 1, self._job.limits[row], asked=asked)

    def _picks(self, group: int, searches: Sequence[Search]) -> tuple[list[float], list[list[tuple[Beam, bool]]]]:
        """The best total of each search, and its candidates, each with what the caller's criteria say of it."""
        K = self._picked
        running = torch.tensor([[beam.score for beam in search.beams] for search in searches])  # [B, W]
        running = running.to(self._scores.device)
        totals = self._totals(group, running)  # [B, W, V]
        values, flat = self._job.pick(totals.flatten(1), self._count, K)  # [B, K]
        places, tokens = flat // totals.shape[2], flat % totals.shape[2]
        raw = None if self._raw is None else self._raw[:, group].masked_fill(running == -torch.inf, -torch.inf).amax(1)
        best = known_best(totals.amax((1, 2)), raw)
        logprobs = self._logprobs[:, group].flatten(1).gather(1, flat)  # [B, K]
        asked = self._job.ends.asked(self._sequences[:, group], places, tokens)
        # One read of the device for all that the host needs; float64 holds every one of these numbers exactly.
        parts = (best[:, None], values, places, tokens, logprobs)
        told: list[list[float]] = torch.cat([part.double() for part in parts], dim=1).tolist()
        candidates = []
        for i, (search, (_, *row)) in enumerate(zip(searches, told, strict=True)):
            columns = zip(row[:K], row[K : 2 * K], row[2 * K : 3 * K], row[3 * K :], asked[i], strict=True)
            candidates.append([
                (Beam(value, int(place), int(token), logprob, search.beams[int(place)]), ends)
                for value, place, token, logprob, ends in columns
                if value != -math.inf  # forbidden, or of a place that nobody holds
            ])  # fmt: skip
        return [row[0] for row in told], candidates

    def _totals(self, group: int, running: Tensor) -> Tensor:
        """[B, W, V] float32: each beam's score and its next token's, less what earlier groups' choice takes off."""
        totals = self._scores[:, group] + running[:, :, None]
        if self._chosen is not None and group:
            totals = totals - self._job.beams.diversity_penalty * self._chosen[:, None]
        # Nobody's text has scores, too; even if they are NaN they are nobody's.
        return totals.masked_fill(running[:, :, None] == -torch.inf, -torch.inf)


def _moves(searches: Sequence[Sequence[Search]], pad: int) -> tuple[list[int], list[int]]:
    """For each row of the batch, the row its new beam continues, and the token. Searches that are done stay put."""
    source: list[int] = []
    tokens: list[int] = []
    for row in searches:
        for search in row:
            first = len(source)
            for place, beam in enumerate(search.beams):
                nobody = search.done or beam is NOBODY
                source.append(first + (place if nobody else beam.place))
                tokens.append(pad if nobody else beam.token)
    return source, tokens


def _best(job: Job, row: Sequence[Search], number: int) -> list[Ended]:
    """The best ended hypotheses of a prompt's groups, as many as were asked for."""
    copies = job.settings.copies
    ended = sorted((ended for search in row for ended in search.ended), key=lambda ended: -ended.score)[:copies]
    if len(ended) < copies:
        raise GenerationError(
            f"row {number} has {len(ended)} hypotheses, and num_return_sequences={copies} were asked for.",
            why="so much is forbidden by processors or filters that there are no more.",
            fix="Ask for fewer sequences, or allow more tokens.", rows=(number,), step=row[0].length,
        )  # fmt: skip
    return ended


def _output(job: Job, found: Sequence[Sequence[Ended]]) -> BeamOutput:
    """The hypotheses as rows: [B * copies, S + new tokens of the longest], the rest padding."""
    prompt, S = job.prompt.repeated(job.settings.copies), job.prompt.width
    ended = [one for row in found for one in row]
    paths = [one.beam.path() for one in ended]
    sequences = prompt.ids.new_full((len(ended), S + max(map(len, paths))), job.settings.pad)
    sequences[:, :S] = prompt.ids
    for i, path in enumerate(paths):
        sequences[i, S : S + len(path)] = torch.tensor([beam.token for beam in path], dtype=torch.int64)
    return BeamOutput(
        sequences, S, tuple(map(len, paths)), tuple(one.reason for one in ended),
        tuple(tuple(beam.logprob for beam in path) for path in paths) if job.settings.logprobs else None,
        tuple(one.score for one in ended),
    )  # fmt: skip
