"""When a row ends: the criteria of transformers 5.23, constructor and call alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from pluglm.errors import InputError


class StoppingCriteria:
    """Base of all criteria: (input_ids [B, S], scores) -> [B] bool, True where a row shall end."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """To be written by a subclass."""
        raise NotImplementedError(f"{type(self).__name__} does not say when a row ends: it has no __call__.")


class MaxLengthCriteria(StoppingCriteria):
    """Ends every row at `max_length` cells, prompt and padding included."""

    def __init__(self, max_length: int, max_position_embeddings: int | None = None) -> None:
        self.max_length = max_length
        self.max_position_embeddings = max_position_embeddings  # the model itself refuses what is longer

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """All rows alike."""
        return _all(input_ids, input_ids.shape[1] >= self.max_length)


class MaxTimeCriteria(StoppingCriteria):
    """Ends every row after `max_time` seconds since `initial_timestamp` (of time.time(); None: now)."""

    def __init__(self, max_time: float, initial_timestamp: float | None = None) -> None:
        self.max_time = max_time
        self.initial_timestamp = time.time() if initial_timestamp is None else initial_timestamp

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """All rows alike."""
        return _all(input_ids, time.time() - self.initial_timestamp > self.max_time)


class EosTokenCriteria(StoppingCriteria):
    """Ends a row at any of these tokens. eos_token_id: one, several, or a tensor [E]."""

    def __init__(self, eos_token_id: int | Sequence[int] | Tensor) -> None:
        ids = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id
        self.eos_token_id = ids if isinstance(ids, Tensor) else torch.tensor(ids)

    def __call__(self, input_ids: Tensor, scores: Any, new_token_length: int = 1, **kwargs: Any) -> Tensor:
        """Looks at the last `new_token_length` tokens."""
        self.eos_token_id = self.eos_token_id.to(input_ids.device)
        return torch.isin(input_ids[:, -new_token_length:], self.eos_token_id).any(1)


class StopStringCriteria(StoppingCriteria):
    """Ends a row whose text ends with a stop string, or whose last token holds the end of one.

    The text of the last tokens is decoded at each step: as many as the longest stop string has bytes.

    Args:
        tokenizer: anything with `decode(ids)`, or such a function itself. stop_strings: one or several.
        start: cells before it are a prompt, whose text does not count.
    """

    def __init__(self, tokenizer: Any, stop_strings: str | Sequence[str], *, start: int = 0) -> None:
        self.stop_strings = (stop_strings,) if isinstance(stop_strings, str) else tuple(stop_strings)
        if not all(self.stop_strings):
            raise InputError("a stop string is empty.", why="every text contains it.", fix="Leave it out.",
                             argument="stop_strings")  # fmt: skip
        self._decode: Callable[[list[int]], str] = getattr(tokenizer, "decode", tokenizer)
        # A token is a byte at least, but it may be an empty one; twice the bytes is a margin.
        self._start = start
        self._tail = 2 * max(len(stop.encode()) for stop in self.stop_strings) + 2

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """A row ends if a stop string that was not there before the last token is there now."""
        first = max(self._start, input_ids.shape[1] - self._tail)
        done = [self._ends(ids) for ids in input_ids[:, first:].tolist()]
        return torch.tensor(done, device=input_ids.device)

    def _ends(self, ids: list[int]) -> bool:
        text, before = self._decode(ids), self._decode(ids[:-1])
        return any(text.count(stop) > before.count(stop) for stop in self.stop_strings)


class ConfidenceCriteria(StoppingCriteria):
    """Ends a draft whose last token is less likely than the threshold. scores: a tuple a step of [1, V]."""

    def __init__(self, assistant_confidence_threshold: float) -> None:
        self.assistant_confidence_threshold = assistant_confidence_threshold

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Of the first row."""
        p = scores[-1].softmax(-1)[0, input_ids[0, -1]]
        return _all(input_ids, bool(p < self.assistant_confidence_threshold))


class StoppingCriteriaList(list[Any]):
    """Several criteria: a row ends where one says so."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """[B] bool."""
        done = _all(input_ids, False)
        for criterion in self:
            said = criterion(input_ids, scores, **kwargs)
            done = done | (said.to(done.device) if isinstance(said, Tensor) else bool(said))
        return done

    @property
    def max_length(self) -> int | None:
        """Of the first criterion that bounds the length."""
        return next((criterion.max_length for criterion in self if isinstance(criterion, MaxLengthCriteria)), None)


def validate_stopping_criteria(stopping_criteria: StoppingCriteriaList, max_length: int) -> StoppingCriteriaList:
    """A copy that bounds the length. Raises InputError if it is bounded otherwise already."""
    found = stopping_criteria.max_length
    if found is not None and found != max_length:
        raise InputError(
            f"stopping_criteria end at {found} tokens, max_length={max_length} says otherwise.",
            fix="Leave one of them out.", argument="max_length",
        )  # fmt: skip
    more = [] if found is not None else [MaxLengthCriteria(max_length)]
    return StoppingCriteriaList([*stopping_criteria, *more])


def _all(input_ids: Tensor, done: bool) -> Tensor:
    return torch.full((input_ids.shape[0],), done, dtype=torch.bool, device=input_ids.device)
