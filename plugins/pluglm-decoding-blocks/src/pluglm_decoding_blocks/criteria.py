"""When a call ends, beside end tokens, limits and stop strings: the caller's criteria, and the clock."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from pluglm.contracts import GenerationConfig, StoppingCriterion
from pluglm_decoding_blocks.values import number


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
    return (*(own or ()), *(() if seconds is None else (MaxTime(seconds),)))
