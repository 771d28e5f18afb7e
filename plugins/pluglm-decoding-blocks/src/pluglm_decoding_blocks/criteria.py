"""When a call ends, beside end tokens, limits and stop strings: the caller's criteria, and the clock."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pluglm.contracts import GenerationConfig, StoppingCriterion
from pluglm.errors import InputError
from pluglm_decoding_blocks.values import described, number


class MaxTime:
    """Ends every row once `seconds` have passed since this object was made.

    It is asked after each token; so a call takes as much longer as one step takes. Source: transformers 5.23
    MaxTimeCriteria.
    """

    def __init__(self, seconds: float) -> None:
        self._until = time.monotonic() + seconds

    def __call__(self, input_ids: Tensor, scores: Tensor | None) -> Tensor:
        """[R] bool, all alike."""
        over = time.monotonic() > self._until
        return torch.full(input_ids.shape[:1], over, dtype=torch.bool, device=input_ids.device)


def call_criteria(
    config: GenerationConfig, own: Sequence[StoppingCriterion] | None = None
) -> tuple[StoppingCriterion, ...]:
    """The caller's criteria and that of `max_time`, whose time begins now. Their rows end with the reason "stop".

    Raises: InputError for a max_time that makes no sense.
    """
    seconds = number(config, "max_time", above=0)
    return (*map(_Own, own or ()), *(() if seconds is None else (MaxTime(seconds),)))


class _Own:
    """A criterion of the caller's, whose answer is looked at: one flag a row."""

    def __init__(self, criterion: StoppingCriterion) -> None:
        self._criterion = criterion

    def __call__(self, input_ids: Tensor, scores: Tensor | None) -> Tensor:
        """[R] bool; one flag for all rows is taken for each. Raises InputError for anything else."""
        ends: Any = self._criterion(input_ids, scores)
        rows = input_ids.shape[0]
        if not isinstance(ends, Tensor) or tuple(ends.shape) not in ((rows,), (1,), ()):
            raise InputError(
                f"a stopping criterion returned {described(ends)}.",
                why=f"it must return one flag a row, [{rows}] bool.",
                fix="Return torch.full((len(input_ids),), flag), if all rows shall end together.",
                argument="stopping_criteria",
            )  # fmt: skip
        flags: Tensor = ends.expand(rows)
        return flags
