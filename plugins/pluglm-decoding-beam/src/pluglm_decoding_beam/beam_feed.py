"""Runs the model for beams: the prompt once a row, then every beam's token in one pass, rows moved in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from pluglm_decoding_blocks.feed import CachedFeed, make_feed
from pluglm_decoding_blocks.prompt import Prompt
from pluglm_decoding_blocks.settings import Settings
from torch import Tensor

from pluglm.contracts import Cache
from pluglm.errors import InputError, UnsupportedRequestError

#: What a search does with a cache: each prompt's row becomes `beams` rows, and each step moves them.
NEEDS = frozenset({"reorder", "repeat"})


class BeamFeed:
    """See the module. beams: rows of each prompt. room: cells that prompt and new tokens need.

    A caller's cache is used for the search, too; then only the prompt is kept and the chosen sequences are fed to it.
    """

    def __init__(
        self, model: Any, prompt: Prompt, settings: Settings, beams: int, room: int, model_kwargs: Mapping[str, Any]
    ) -> None:
        given: Cache | None = model_kwargs.get("past_key_values")
        if given is not None:
            _check_given(given)
        self._feed = make_feed(model, prompt, replace(settings, copies=beams), room, model_kwargs)
        self._cache = self._feed.cache if isinstance(self._feed, CachedFeed) else None
        if self._cache is not None and (missing := tuple(sorted(NEEDS - self._cache.operations))):
            raise UnsupportedRequestError(
                f"a beam search cannot use a {self._cache.layout} cache: it lacks {' and '.join(missing)}.",
                why="rows of a cache follow the beams that they belong to.",
                fix="Load the model with another cache layout, or pass use_cache=False.", reasons=missing,
            )  # fmt: skip
        self._model, self._prompt, self._beams = model, prompt, beams
        self._given = given is not None

    @property
    def hidden_states(self) -> tuple[Tensor, ...] | None:
        """As of `Feed`; of all beams."""
        return self._feed.hidden_states

    def prefill(self) -> Tensor:
        """[R, V] after the prompt; R is B times the beams."""
        return self._feed.prefill()

    def step(self, sequences: Tensor, source: Sequence[int]) -> Tensor:
        """[R, V] after one more token. sequences: [R, S] with it. source: the row that each row's cells are in now."""
        if self._cache is not None and list(source) != list(range(len(source))):
            self._cache.reorder(torch.tensor(source, device=sequences.device))
        return self._feed.step(sequences, None)

    def take_back(self, copies: int = 1) -> None:
        """Leave a caller's cache with the prompt alone, each row `copies` times."""
        if not self._given:
            return
        assert self._cache is not None
        rows = torch.arange(len(self._prompt.lengths), device=self._prompt.ids.device).repeat_interleave(copies)
        held = self._cache.batch_size // len(self._prompt.lengths)  # the beams, once the prompt was run
        if (held, copies) != (1, 1):
            self._cache.select(rows * held)
        self._cache.crop(min(self._cache.length, self._prompt.width))

    def give(self, sequences: Tensor, counts: Sequence[int], copies: int) -> None:
        """Leave a caller's cache with all cells of `sequences` but the last; cells after a row's end are holes.

        Args:
            sequences: [B * copies, S + new tokens]. counts: new tokens of each row.
        """
        self.take_back(copies)
        fed = sequences.shape[1] - 1 - self._prompt.width
        if not self._given or fed <= 0:
            return
        assert self._cache is not None
        ended = torch.arange(fed, device=sequences.device) >= torch.tensor(counts, device=sequences.device)[:, None]
        positions = torch.where(ended, -1, self._cache.next_positions(fed).to(sequences.device))  # [rows, fed]
        self._model.step(sequences[:, self._prompt.width : -1], self._cache, positions=positions)


def _check_given(cache: Cache) -> None:
    """Can the search be undone in the caller's cache?"""
    missing = sorted((NEEDS | {"crop", "select"}) - cache.operations)
    moving = sorted({slot.kind for slot in cache.slots} - {"kv", "latent", "cross", "shared"})
    if missing or moving:
        lacks = f"has no {', '.join(missing)}" if missing else f"holds {', '.join(moving)} slots, which cannot go back"
        raise InputError(
            "the given cache cannot be used for a beam search.",
            why=f"the search is undone in it afterwards, and its layout ({cache.layout}) {lacks}.",
            fix="Leave past_key_values out.", argument="past_key_values",
        )  # fmt: skip
