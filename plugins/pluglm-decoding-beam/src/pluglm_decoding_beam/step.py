"""One token of every search of a call: scores, candidates, and what each search makes of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from pluglm_decoding_blocks.failures import no_token
from pluglm_decoding_blocks.processors import Processors, known_best
from pluglm_decoding_blocks.prompt import Prompt
from pluglm_decoding_blocks.settings import Settings
from torch import Tensor

from pluglm.contracts import FinishReason
from pluglm_decoding_beam.beam_feed import BeamFeed
from pluglm_decoding_beam.beam_settings import BeamSettings
from pluglm_decoding_beam.certain import Announcer
from pluglm_decoding_beam.ends import Ends
from pluglm_decoding_beam.guide import Guide
from pluglm_decoding_beam.hypotheses import Beam, Candidate, Search
from pluglm_decoding_beam.picking import Pick, Select


@dataclass(frozen=True)
class Job:
    """One call, read and checked.

    Attributes:
        prompt: one row a prompt. limits: new tokens of each prompt's hypotheses at most.
        announcer: of the streamer, if there is one.
        guide: keeps to phrases that must occur; None: there are none.
    """

    settings: Settings
    beams: BeamSettings
    prompt: Prompt
    limits: tuple[int, ...]
    feed: BeamFeed
    process: Processors
    pick: Pick
    select: Select
    guide: Guide | None
    ends: Ends
    announcer: Announcer | None


class Step:
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
        if G > 1 or job.guide is not None:
            scores = scores.clone()  # written to below, and it may be `logprobs` itself
        self._scores = scores.view(B, G, W, V)
        self._raw = raw.view(B, G, W) if raw is not None else None
        self._sequences = sequences.view(B, G, W, -1)
        # A beam has one token for each way to end and one to go on with, at least.
        self._picked = min(max(2, 1 + len(job.settings.eos)) * W, W * V)
        self._chosen = torch.zeros(B, V, device=logits.device) if G > 1 else None

    def scores(self) -> Tensor:
        """[R, V] float32 as they were added up; complete once every group has advanced."""
        return self._scores.flatten(0, 2)

    def advance(self, group: int) -> None:
        """Let every search of this group go one token on. Raises if one of them has no finite score to go on with."""
        job, searches = self._job, [row[group] for row in self._searches]
        best, candidates = self._picks(group, searches)
        going_on = [i for i, search in enumerate(searches) if not search.done]
        failed = {i: best[i] for i in going_on if not math.isfinite(best[i])}
        if failed and job.guide is not None and all(value == -math.inf for value in failed.values()):
            raise job.guide.stuck(tuple(failed), self._count)
        if failed:
            raise no_token(failed, self._count)
        taken: list[tuple[int, int]] = []
        for i in going_on:
            mine: list[Candidate] = [(beam, self._reason(i, beam, asked)) for beam, asked in candidates[i]]
            searches[i].take(*job.select(mine, job.beams.width))
            # Those that go on, or would if there were room: later groups shall not keep away from an end token.
            kept = [beam.token for beam, reason in mine if reason in (None, "length")][: job.beams.width]
            taken += [(i, token) for token in kept]
        if self._chosen is not None and taken:
            at = tuple(torch.tensor(taken, device=self._chosen.device).T)
            self._chosen.index_put_(at, self._chosen.new_ones(len(taken)), accumulate=True)

    def _reason(self, row: int, beam: Beam, asked: bool) -> FinishReason | None:
        return self._job.ends.reason(beam, self._count + 1, self._job.limits[row], asked=asked)

    def _picks(self, group: int, searches: Sequence[Search]) -> tuple[list[float], list[list[tuple[Beam, bool]]]]:
        """The best total of each search, and its candidates, each with what the caller's criteria say of it."""
        running = torch.tensor([[beam.score for beam in search.beams] for search in searches])  # [B, W]
        running = running.to(self._scores.device)
        totals = self._totals(group, running, searches)  # [B, W, V]
        values, flat = self._job.pick(totals, self._count, self._picked)  # [B, K]
        K = values.shape[1]
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
                (self._beam(search.beams[int(place)], value, int(place), int(token), logprob), ends)
                for value, place, token, logprob, ends in columns
                if value != -math.inf  # forbidden, or of a place that nobody holds
            ])  # fmt: skip
        return [row[0] for row in told], candidates

    def _beam(self, parent: Beam, score: float, place: int, token: int, logprob: float) -> Beam:
        guide = self._job.guide
        state = parent.state if guide is None else guide.step(parent.state, token)
        return Beam(score, place, token, logprob, parent, state)

    def _totals(self, group: int, running: Tensor, searches: Sequence[Search]) -> Tensor:
        """[B, W, V] float32: each beam's score and its next token's, less what earlier groups' choice takes off."""
        scores = self._scores[:, group]
        if self._chosen is not None and group:
            scores -= self._job.beams.diversity_penalty * self._chosen[:, None]
        if self._job.guide is not None:
            self._job.guide.restrict(scores, searches)
        # Nobody's text has scores, too; even if they are NaN they are nobody's.
        return (scores + running[:, :, None]).masked_fill(running[:, :, None] == -torch.inf, -torch.inf)
