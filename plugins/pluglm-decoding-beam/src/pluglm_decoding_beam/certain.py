"""Tells a streamer of a search what is certain: what every hypothesis that may still be the best one says."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pluglm.contracts import Streamer
from pluglm_decoding_beam.hypotheses import NOBODY, Search, ranked


class Announcer:
    """The streamer of one call.

    It hears of the best sequence of each prompt. Token t of all prompts is told in one `put`, as soon as it is certain
    for each of them; nothing is ever taken back. A prompt whose sequence is shorter has -1 there.

    Args:
        prompts: how many. device: of what is told.
    """

    def __init__(self, streamer: Streamer, prompts: int, device: torch.device) -> None:
        self._streamer, self._device = streamer, device
        self._known: list[list[int]] = [[] for _ in range(prompts)]
        self._over = [False] * prompts
        self._told = 0

    def hear(self, searches: Sequence[Sequence[Search]]) -> None:
        """Tell what has become certain. searches: [B][G]."""
        for row, groups in enumerate(searches):
            if not self._over[row]:
                self._known[row] += _agreed(groups, len(self._known[row]))
                self._over[row] = all(search.done for search in groups)
        open_ = [len(known) for known, over in zip(self._known, self._over, strict=True) if not over]
        until = min(open_) if open_ else max(map(len, self._known))
        for step in range(self._told, until):
            tokens = [known[step] if step < len(known) else -1 for known in self._known]
            self._streamer.put(torch.tensor(tokens, device=self._device))
        self._told = max(self._told, until)


def _agreed(groups: Sequence[Search], known: int) -> list[int]:
    """What all hypotheses of a prompt say after its `known` tokens that are certain already.

    Of those that have ended only the best counts: the others will never be the best.
    """
    texts = [
        beam.last(search.length - known)
        for search in groups if not search.done
        for beam in search.beams if beam is not NOBODY
    ]  # fmt: skip
    texts += [ended.beam.last(ended.length - known) for ended in ranked(groups)[:1]]
    agreed: list[int] = []
    for tokens in zip(*texts, strict=False):  # one that has ended may be shorter than those that go on
        if len(set(tokens)) > 1:
            break
        agreed.append(tokens[0])
    return agreed
