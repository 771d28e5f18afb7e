"""Keeps a search on its way to phrases that must occur: what may follow, which candidates there are, who goes on.

Hokamp and Liu 2017, "Lexically constrained decoding for sequence generation using grid beam search", section 3, and
Anderson et al. 2017, "Guided open vocabulary image captioning with constrained beam search", section 3: hypotheses
compete with those that are as far. Post and Vilar 2018, "Fast lexically constrained decoding with dynamic beam
allocation", section 3: all banks share one beam of fixed size.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import chain, zip_longest

import torch
from torch import Tensor

from pluglm.contracts import FinishReason
from pluglm.errors import GenerationError, InputError
from pluglm_decoding_beam.hypotheses import NOBODY, Beam, Candidate, Search
from pluglm_decoding_beam.tracker import START, State, Tracker


class Guide:
    """The phrases of one call, for all of its searches.

    Args:
        eos: end tokens. limits: new tokens of each prompt at most. device: of the scores.
    Raises: InputError if a prompt's limit leaves no room for the phrases.
    """

    def __init__(self, tracker: Tracker, eos: Sequence[int], limits: Sequence[int], device: torch.device) -> None:
        self._tracker = tracker
        self._eos = torch.tensor(eos, dtype=torch.int64, device=device)
        self._tokens = torch.tensor(tracker.tokens, dtype=torch.int64, device=device)
        shortest, row = min((limit, row) for row, limit in enumerate(limits))
        if tracker.need(START) > shortest:
            raise InputError(
                f"the phrases cannot all occur in row {row}: they take {tracker.need(START)} tokens at least, and at "
                f"most {shortest} new ones may come.",
                fix="Raise max_new_tokens (or max_length), or ask for fewer phrases.", argument="max_new_tokens",
            )  # fmt: skip

    def step(self, state: State, token: int) -> State:
        """A hypothesis' state after one more token."""
        return self._tracker.step(state, token)

    def restrict(self, scores: Tensor, searches: Sequence[Search]) -> None:
        """Forbid, in place, ends before all phrases are there, and tokens after which they no longer fit in.

        Args:
            scores: [B, W, V] of the searches' beams.
        """
        for row, search in enumerate(searches):
            if search.done:
                continue
            room = search.limit - search.length - 1  # tokens after the one that is chosen now
            for place, beam in enumerate(search.beams):
                if beam is NOBODY or self._tracker.need(beam.state) == 0:
                    continue
                mine = scores[row, place]
                mine[self._eos] = -torch.inf
                if self._tracker.need(self._tracker.restarted(beam.state)) > room:
                    kept = [t for t in self._tracker.tokens if self._tracker.need(self.step(beam.state, t)) <= room]
                    before = mine[kept]
                    mine[:] = -torch.inf
                    mine[kept] = before

    def pick(self, totals: Tensor, _: int, count: int) -> tuple[Tensor, Tensor]:
        """As `Pick`, for [B, W, V]: of every beam all tokens of the phrases and its `count` best others.

        So there are candidates for every bank, however far the banks' scores lie apart.
        """
        B, W, V = totals.shape
        left, tokens = totals.clone(), self._tokens.expand(B, W, -1)
        asked = left.gather(2, tokens)  # [B, W, T]
        left.scatter_(2, tokens, -torch.inf)
        others = left.topk(min(count, V), dim=2)
        values = torch.cat((asked, others.values), dim=2).flatten(1)
        first = torch.arange(W, device=totals.device)[:, None] * V
        places = (torch.cat((tokens, others.indices), dim=2) + first).flatten(1)
        values, order = values.sort(dim=1, descending=True, stable=True)
        return values, places.gather(1, order)

    def select(self, candidates: Sequence[Candidate], width: int) -> tuple[list[tuple[Beam, FinishReason]], list[Beam]]:
        """Those that end, and those that go on: by turns the best of each bank, the bank that is farthest first.

        A bank holds the hypotheses that need equally many tokens. Only in the one that needs none a hypothesis may
        end, if it is among the first `width` there; others that a stop string or a criterion ends are dropped.
        """
        banks: defaultdict[int, list[Candidate]] = defaultdict(list)
        for beam, reason in candidates:
            banks[self._tracker.need(beam.state)].append((beam, reason))
        ended = [(beam, reason) for beam, reason in banks[0][:width] if reason is not None]
        going_on = [[beam for beam, reason in banks[need] if reason is None] for need in sorted(banks)]
        turns = chain.from_iterable(zip_longest(*going_on))
        return ended, [beam for beam in turns if beam is not None][:width]

    def stuck(self, rows: Sequence[int], step: int) -> GenerationError:
        """The error for prompts none of whose hypotheses can hold all phrases any more."""
        return GenerationError(
            f"no hypothesis of row {', '.join(map(str, rows))} can hold all phrases: none is left at new token {step}.",
            why="logits processors forbid tokens that the phrases need, or a stop string or criterion ended every "
            "hypothesis before it held them.",
            fix="Leave out phrases, processors or stop strings that contradict each other.",
            rows=tuple(rows), step=step,
        )  # fmt: skip
