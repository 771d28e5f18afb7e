"""Runs the model: the prompt once, in chunks if asked, then one token a row and step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from pluglm.contracts import Cache
from pluglm.errors import ContextLengthError, InputError
from pluglm_decoding_blocks.prompt import Prompt
from pluglm_decoding_blocks.settings import Settings


class Feed(Protocol):
    """Gives the logits of the next token."""

    #: Of the last pass, where output_hidden_states was asked for: L + 1 tensors [R, T, C]; T: the prompt's cells that
    #: were fed, then 1.
    hidden_states: tuple[Tensor, ...] | None
    #: Whether `step` reads more of the sequences than the last token.
    rereads: bool

    def prefill(self) -> Tensor:
        """[R, V] after the prompt; R is B times the copies."""
        ...

    def step(self, sequences: Tensor, padded: Tensor | None) -> Tensor:
        """[R, V] after one more token.

        Args:
            sequences: [R, S] with it; [R, 1], it alone, where the feed does not reread. padded: [R] bool, rows whose
                token is padding.
        """
        ...

    def can_take_back(self) -> bool:
        """May the loop run one step too far?"""
        ...

    def finish(self, cells: int) -> None:
        """The sequences have this many cells, the last token aside."""
        ...


def make_feed(model: Any, prompt: Prompt, settings: Settings, room: int, model_kwargs: Mapping[str, Any]) -> Feed:
    """What runs the model. model_kwargs: of a strategy's call, without attention_mask."""
    extra = further_arguments(model_kwargs)
    given = model_kwargs.get("past_key_values")
    if model_kwargs.get("use_cache") is not False:
        return CachedFeed(model, prompt, settings, room=room, given=given, extra=extra)
    if given is not None:
        raise InputError("past_key_values is given and use_cache=False says not to use it.",
                         fix="Leave one of them out.", argument="use_cache")  # fmt: skip
    return RecomputingFeed(model, prompt, settings, room=room, extra=extra)


def further_arguments(model_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a strategy's `model_kwargs` that only the forward call knows. Raises InputError for embeddings."""
    if model_kwargs.get("inputs_embeds") is not None:
        raise InputError("inputs_embeds cannot be continued from.", why="the strategy needs the ids of the prompt.",
                         fix="Pass input_ids.", argument="inputs_embeds")  # fmt: skip
    # The strategy decides which logits it needs and in what form; cells are always the next ones.
    decided = ("use_cache", "past_key_values", "logits_to_keep", "return_dict", "cache_position", "inputs_embeds")
    return {name: value for name, value in model_kwargs.items() if name not in decided and value is not None}


class CachedFeed:
    """With a cache: every token goes through the model once.

    Args:
        room: cells that prompt and new tokens need. given: the caller's cache, or None to make one.
        extra: further keyword arguments of every forward call.
    """

    rereads = False

    def __init__(
        self, model: Any, prompt: Prompt, settings: Settings, *, room: int, given: Cache | None,
        extra: Mapping[str, Any],
    ) -> None:  # fmt: skip
        self._model, self._prompt, self._settings = model, prompt, settings
        self._extra = {name: value for name, value in extra.items() if name != "position_ids"}
        self._position_ids = extra.get("position_ids")
        self.hidden_states: tuple[Tensor, ...] | None = None
        self.given = given is not None
        rows = prompt.ids.shape[0]
        if given is not None:
            _check(given, prompt, room)
            if self._extra and rows * settings.copies > 1:
                raise InputError(
                    f"{', '.join(self._extra)} cannot be combined with a given cache of several rows.",
                    why="the forward call cannot leave out the token of a row that has ended; the cache would keep it.",
                    fix="Pass one row at a time, or leave past_key_values out.",
                    argument=next(iter(self._extra)),
                )
            if settings.copies > 1 and "repeat" not in given.operations:
                raise InputError(
                    f"the given cache cannot repeat its rows for num_return_sequences={settings.copies}.",
                    why=f"its layout ({given.layout}) has no `repeat`.",
                    fix="Choose another cache layout, or leave past_key_values out.", argument="past_key_values",
                )  # fmt: skip
        self.cache: Cache = given if given is not None else model.new_cache(batch_size=rows, capacity=room)
        self._late_copies = settings.copies
        if settings.copies > 1 and "repeat" not in self.cache.operations:  # then every copy is prefilled by itself
            self.cache = model.new_cache(batch_size=rows * settings.copies, capacity=room)
            self._prompt, self._late_copies = prompt.repeated(settings.copies), 1
            if self._position_ids is not None and self._position_ids.shape[0] != 1:
                self._position_ids = self._position_ids.repeat_interleave(settings.copies, 0)

    @property
    def plain(self) -> bool:
        """Whether a step feeds the last tokens at the positions that follow, and nothing else."""
        return not self._extra

    def can_take_back(self) -> bool:
        """May the loop run one step too far? The cell is taken back then; windows and states cannot do that."""
        if not self.given:
            return True
        plain = all(slot.kind in ("kv", "latent", "cross", "shared") for slot in self.cache.slots)
        return len(self._prompt.lengths) * self._late_copies == 1 and plain and "crop" in self.cache.operations

    def finish(self, cells: int) -> None:
        """Leave a caller's cache with all cells of the sequences but the last, which was never fed."""
        if self.given and self.cache.length > cells:
            self.cache.crop(cells)

    def prefill(self) -> Tensor:
        """Feed what the cache does not hold yet."""
        prompt, past, S = self._prompt, self.cache.length, self._prompt.width
        size = self._settings.chunk or S
        logits, hidden = _LastLogits(prompt), []
        for start in range(past, S, size):
            stop = min(start + size, S)
            more = dict(self._extra)
            if self._position_ids is not None:
                more["position_ids"] = self._position_ids[:, start - past : stop - past]
            output = self._model(
                input_ids=prompt.ids[:, start:stop],
                attention_mask=prompt.mask[:, :stop] if prompt.mask is not None else None,
                past_key_values=self.cache, use_cache=True, logits_to_keep=logits.wanted(start, stop), return_dict=True,
                **more,
            )  # fmt: skip
            logits.take(output.logits, start, stop)
            if self._extra.get("output_hidden_states"):
                hidden.append(output.hidden_states)
        if hidden:
            joined = (torch.cat(parts, dim=1) for parts in zip(*hidden, strict=True))
            self.hidden_states = tuple(state.repeat_interleave(self._late_copies, 0) for state in joined)
        if self._late_copies == 1:
            return logits.result()
        self.cache.repeat(self._late_copies)
        return logits.result().repeat_interleave(self._late_copies, 0)

    def step(self, sequences: Tensor, padded: Tensor | None) -> Tensor:
        """Feed the last token. In a caller's cache, padding of ended rows becomes a hole: they can go on later."""
        tokens = sequences if sequences.shape[1] == 1 else sequences[:, -1:]
        positions = None
        if padded is not None and self.given and len(tokens) > 1:
            positions = torch.where(padded[:, None], -1, self.cache.next_positions(1))  # [R, 1]
        if not self._extra:
            step: Tensor = self._model.step(tokens, self.cache, positions=positions)
            return step.select(1, -1)
        output = self._model(
            input_ids=tokens, attention_mask=None, past_key_values=self.cache, use_cache=True, logits_to_keep=1,
            return_dict=True, **self._extra,
        )  # fmt: skip
        if self._extra.get("output_hidden_states"):
            self.hidden_states = tuple(output.hidden_states)
        last: Tensor = output.logits[:, -1]
        return last


class RecomputingFeed:
    """Without a cache: the whole sequence again for every token. For models that keep nothing, and for tests."""

    rereads = True

    def __init__(self, model: Any, prompt: Prompt, settings: Settings, *, room: int, extra: Mapping[str, Any]) -> None:
        for name, unusable in (("prefill_chunk_size", settings.chunk), ("position_ids", extra.get("position_ids"))):
            if unusable is not None:
                raise InputError(f"{name} needs a cache.", fix=f"Leave out {name}, or leave out use_cache=False.",
                                 argument=name)  # fmt: skip
        self._model, self._extra = model, dict(extra)
        self.hidden_states: tuple[Tensor, ...] | None = None
        self._prompt = prompt.repeated(settings.copies)
        self._mask: Tensor | None = None
        if self._prompt.mask is not None:
            self._mask = torch.ones(len(self._prompt.lengths), room, dtype=torch.int64, device=prompt.ids.device)
            self._mask[:, : prompt.width] = self._prompt.mask

    def prefill(self) -> Tensor:
        """The whole prompt."""
        logits = _LastLogits(self._prompt)
        S = self._prompt.width
        logits.take(self._run(self._prompt.ids, logits.wanted(0, S)), 0, S)
        return logits.result()

    def step(self, sequences: Tensor, padded: Tensor | None) -> Tensor:
        """The whole sequence; of its hidden states the last cell's, as with a cache."""
        logits = self._run(sequences, 1)[:, -1]
        if self.hidden_states is not None:
            self.hidden_states = tuple(state[:, -1:] for state in self.hidden_states)
        return logits

    def can_take_back(self) -> bool:
        """Nothing is kept."""
        return True

    def finish(self, cells: int) -> None:
        """Nothing is kept."""

    def _run(self, ids: Tensor, keep: int | Tensor) -> Tensor:
        mask = self._mask[:, : ids.shape[1]] if self._mask is not None else None
        output = self._model(
            input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=keep, return_dict=True, **self._extra
        )
        if self._extra.get("output_hidden_states"):
            self.hidden_states = tuple(output.hidden_states)
        logits: Tensor = output.logits
        return logits


class _LastLogits:
    """Collects each row's logits at its last real token, which padding on the right may put in any chunk."""

    def __init__(self, prompt: Prompt) -> None:
        self._last, self._width = prompt.last, prompt.width
        self._aligned = all(last == prompt.width - 1 for last in prompt.last)
        self._device = prompt.ids.device
        self._found: Tensor | None = None

    def _cells(self, start: int, stop: int) -> list[int]:
        return sorted({last - start for last in self._last if start <= last < stop})

    def wanted(self, start: int, stop: int) -> int | Tensor:
        """`logits_to_keep` for the cells start … stop - 1; one cell where none is wanted."""
        cells = [] if self._aligned else self._cells(start, stop)
        return torch.tensor(cells, device=self._device) if cells else 1

    def take(self, logits: Tensor, start: int, stop: int) -> None:
        """Keep what `wanted` asked for. logits: [B, cells, V]."""
        if self._aligned:
            self._found = logits[:, -1]
            return
        if self._found is None:
            self._found = torch.empty_like(logits[:, 0])
        column = {cell: i for i, cell in enumerate(self._cells(start, stop))}
        for row, last in enumerate(self._last):
            if start <= last < stop:
                self._found[row] = logits[row, column[last - start]]

    def result(self) -> Tensor:
        """[B, V]."""
        assert self._found is not None
        return self._found


def _check(cache: Cache, prompt: Prompt, room: int) -> None:
    """Does the caller's cache fit the prompt?"""
    B, S = prompt.ids.shape
    if cache.batch_size != B:
        raise InputError(
            f"the given cache holds {cache.batch_size} rows, the prompt has {B}.",
            fix="Use its `select` or `repeat`, or make one for this batch.", argument="past_key_values",
        )  # fmt: skip
    if cache.length >= S:
        raise InputError(
            f"the given cache holds {cache.length} cells and input_ids has {S}: no new token is left to feed.",
            why="input_ids is the full sequence, tokens that the cache holds included; the rest is fed.",
            fix="Append the new tokens to input_ids, or crop the cache by one cell.", argument="past_key_values",
        )  # fmt: skip
    if min(prompt.last) < cache.length:
        raise InputError(
            f"row {prompt.last.index(min(prompt.last))} has no token after the {cache.length} cells of the cache.",
            why="its new cells are all padding, so there is nothing to continue from.",
            fix="Leave the row out, or give it a new token.", argument="attention_mask",
        )  # fmt: skip
    if cache.capacity is not None and cache.capacity < room - 1:  # the last new token is never fed
        raise ContextLengthError(
            f"the given cache holds {cache.capacity} cells a row; prompt and new tokens need {room - 1}.",
            fix="Make it with a larger capacity, or lower max_new_tokens.", tokens=room - 1, limit=cache.capacity,
        )  # fmt: skip
