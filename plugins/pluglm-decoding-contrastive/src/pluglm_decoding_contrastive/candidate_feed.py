"""Runs the model for contrastive search: each candidate once, and the chosen one's cells become the text's.

The cache has a row for each candidate. All candidates of a text are run in one pass; before the next pass their rows
become what the chosen one's row is. So no token is run twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from pluglm_decoding_blocks.feed import CachedFeed, make_feed
from pluglm_decoding_blocks.prompt import Prompt
from pluglm_decoding_blocks.settings import Settings
from torch import Tensor

from pluglm.contracts import Cache
from pluglm.errors import ContextLengthError, InputError, UnsupportedRequestError
from pluglm_decoding_contrastive.history import History
from pluglm_decoding_contrastive.watched import LastStates

#: What candidates do to a cache: each text's row becomes one a candidate, and each token moves them.
NEEDS = frozenset({"reorder", "repeat"})
#: To leave a caller's cache with one row a text, without the last token, with holes behind texts that ended before.
_GIVEN = NEEDS | {"select", "crop", "rollback"}


class CandidateFeed:
    """A `Feed` whose `attempt` and `take` do the work of `step`.

    Args:
        count: candidates of each text, K. room: cells that prompt and new tokens need.
    """

    rereads = False  # `attempt` has run the candidates

    def __init__(
        self, model: Any, prompt: Prompt, settings: Settings, count: int, room: int, model_kwargs: Mapping[str, Any]
    ) -> None:
        self._given: Cache | None = model_kwargs.get("past_key_values")
        if self._given is not None:
            _check_given(self._given, room)
        self._model, self._prompt, self._count = model, prompt, count
        self._every = settings.hidden_states
        self._watched = LastStates(model, every=self._every)
        self._feed = make_feed(self._watched, prompt, replace(settings, copies=count), room, model_kwargs)
        self._cache = self._feed.cache if isinstance(self._feed, CachedFeed) else None
        if self._cache is not None and (missing := tuple(sorted(NEEDS - self._cache.operations))):
            raise UnsupportedRequestError(
                f"contrastive search cannot use a {self._cache.layout} cache: it lacks {' and '.join(missing)}.",
                why="every candidate has a row, and rows follow the candidate that was chosen.",
                fix="Load the model with another cache layout, or pass use_cache=False.", reasons=missing,
            )  # fmt: skip
        B = prompt.ids.shape[0]
        self._first = torch.arange(B, device=prompt.ids.device) * count  # [B], the row of each text's first candidate
        self._chosen = self._first
        self._moved = True  # all rows of a text hold the same cells
        self._history: History
        self._logits: Tensor
        self._tried: tuple[Tensor, tuple[Tensor, ...]]
        self._next: tuple[Tensor, ...] = ()
        self.hidden_states: tuple[Tensor, ...] | None = None

    def prefill(self) -> Tensor:
        """[B, V] after the prompt, whose hidden states are kept."""
        past = self._given.length if self._given is not None else 0
        self._logits = self._feed.prefill()[:: self._count]
        states = self._watched.take()  # [B, S - past, C], or a row a candidate where nothing is cached
        states = tuple(layer[:: layer.shape[0] // len(self._prompt.lengths)] for layer in states)
        self.hidden_states = states if self._every else None
        last = torch.cat((self._past_states(past), states[-1]), dim=1) if past else states[-1]
        self._history = History(last, self._prompt.mask)
        return self._logits

    def _past_states(self, past: int) -> Tensor:
        """[B, past, C] of the cells that a caller's cache holds: it keeps no hidden states, so they are made again."""
        mask = self._prompt.mask[:, :past] if self._prompt.mask is not None else None
        output = self._model(
            input_ids=self._prompt.ids[:, :past], attention_mask=mask, use_cache=False, logits_to_keep=1,
            output_hidden_states=True, return_dict=True,
        )  # fmt: skip
        states: Tensor = output.hidden_states[-1]
        return states

    def attempt(self, sequences: Tensor, candidates: Tensor) -> Tensor:
        """Run every candidate. sequences: [B, S]; candidates: [B, K]. Returns their likeness to the text, [B, K]."""
        if self._cache is not None and not self._moved:
            self._cache.reorder(self._chosen.repeat_interleave(self._count))
        texts = sequences.repeat_interleave(self._count, 0)
        logits = self._feed.step(torch.cat((texts, candidates.reshape(-1, 1)), dim=1), None)  # [B * K, V]
        states = tuple(layer[:, -1:] for layer in self._watched.take())  # [B * K, 1, C]
        self._tried = logits, states
        return self._history.similarity(states[-1].view(*candidates.shape, -1))

    def take(self, place: Tensor) -> None:
        """Go on with these candidates. place: [B] below K."""
        logits, states = self._tried
        self._chosen, self._moved = self._first + place, False
        self._logits = logits[self._chosen]
        self._next = tuple(layer[self._chosen] for layer in states)  # [B, 1, C]
        self._history.append(self._next[-1][:, 0])

    def step(self, sequences: Tensor, padded: Tensor | None) -> Tensor:
        """[B, V] after the chosen candidates, which have been run. In a caller's cache padding becomes a hole."""
        if padded is not None and self._given is not None and len(padded) > 1:
            self._given.rollback(padded.long().repeat_interleave(self._count))
        self.hidden_states = self._next if self._every else None
        return self._logits

    def can_take_back(self) -> bool:
        """A caller's cache is looked after step by step; nobody sees one of our own."""
        return self._given is None

    def finish(self, cells: int) -> None:
        """Leave a caller's cache with a row for each text, and these many cells."""
        if self._given is None:
            return
        if self._given.batch_size != len(self._prompt.lengths):
            self._given.select(self._first)  # a text's rows differ in the last token alone, which is cut off
        self._given.crop(min(self._given.length, cells))

    def take_back(self) -> None:
        """After a failure: leave a caller's cache with what it holds of the prompt."""
        self.finish(self._prompt.width)


def _check_given(cache: Cache, room: int) -> None:
    """Can candidates be tried in the caller's cache, and taken back?"""
    missing = sorted(_GIVEN - cache.operations)
    moving = sorted({slot.kind for slot in cache.slots} - {"kv", "latent", "cross", "shared"})
    if missing or moving:
        lacks = f"has no {', '.join(missing)}" if missing else f"holds {', '.join(moving)} slots, which cannot go back"
        raise InputError(
            "the given cache cannot be used for contrastive search.",
            why=f"candidates are tried in it and taken back, and its layout ({cache.layout}) {lacks}.",
            fix="Leave past_key_values out.", argument="past_key_values",
        )  # fmt: skip
    if cache.capacity is not None and cache.capacity < room:  # here the last new token is fed, as a candidate
        raise ContextLengthError(
            f"the given cache holds {cache.capacity} cells a row; prompt and new tokens need {room}.",
            fix="Make it with a larger capacity, or lower max_new_tokens.", tokens=room, limit=cache.capacity,
        )  # fmt: skip
