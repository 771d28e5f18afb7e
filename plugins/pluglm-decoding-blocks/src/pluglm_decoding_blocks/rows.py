"""Which rows go on, which have ended and why. On the host where ids are read anyway, else on the device, one step late.

Reading a result from an accelerator stops the host until the device has caught up. So there the flag of step i is
read after step i + 1 was queued: the loop may run one step too far, never wait.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from pluglm.contracts import FinishReason
from pluglm_decoding_blocks.endings import Endings
from pluglm_decoding_blocks.failures import no_token
from pluglm_decoding_blocks.settings import Settings

_REASONS: tuple[FinishReason, ...] = ("length", "eos", "stop")


class Rows(Protocol):
    """The rows of one call."""

    #: [R] bool, rows that have ended; None: none has, as far as the host knows.
    ended: Tensor | None

    def record(self, tokens: Tensor, best: Tensor, done: Tensor | None) -> None:
        """Take note of one step.

        Args:
            tokens: [R] int64, pad in ended rows. best: [R] each row's best score.
            done: [R] bool, the caller's criteria.
        Raises: a typed error if a row that goes on has no finite best score.
        """
        ...

    def finished(self) -> bool:
        """Have all rows ended, as far as is known now?"""
        ...

    def result(self) -> tuple[tuple[int, ...], tuple[FinishReason, ...]]:
        """New tokens and finish reason of each row. Raises as `record`, if a failure was not told yet."""
        ...


class HostRows:
    """Bookkeeping in Python: one read of the device a step. Needed for stop strings and streamers."""

    def __init__(self, endings: Endings, device: torch.device) -> None:
        self._endings = endings
        self._alive = list(range(len(endings.limits)))
        self._device = device
        self.ended: Tensor | None = None

    def record(self, tokens: Tensor, best: Tensor, done: Tensor | None) -> None:
        """One read from the device for all that is needed."""
        if self._device.type == "cpu":
            ids, scores = tokens.tolist(), best.tolist()
            criteria = done.tolist() if done is not None else None
        else:
            parts = [tokens.double(), best.double()] + ([done.double()] if done is not None else [])
            ids, scores, *more = torch.stack(parts).tolist()
            criteria = more[0] if more else None
        failed = {row: scores[row] for row in self._alive if not math.isfinite(scores[row])}
        if failed:
            raise no_token(failed, self._endings.counts[min(failed)])
        self._push(ids, criteria)

    @property
    def room(self) -> int:
        """New tokens that every row that goes on may have yet."""
        return min(self._endings.limits[row] - self._endings.counts[row] for row in self._alive)

    def record_run(self, tokens: Tensor) -> None:
        """Take note of several steps, [R, n], of which only the last may end a row; their scores were looked at."""
        for row in self._alive:
            self._endings.counts[row] += tokens.shape[1] - 1
        self._push(tokens[:, -1].tolist(), None)

    def _push(self, ids: Sequence[float], criteria: Sequence[float] | None) -> None:
        push = self._endings.push
        going_on = [
            row
            for row in self._alive
            if not push(row, int(ids[row]), done=criteria is not None and bool(criteria[row]))
        ]
        if len(going_on) != len(self._alive):
            self._alive = going_on
            ended = [True] * len(self._endings.counts)
            for row in going_on:
                ended[row] = False
            self.ended = torch.tensor(ended, device=self._device)

    def finished(self) -> bool:
        """Known at once."""
        return not self._alive

    def result(self) -> tuple[tuple[int, ...], tuple[FinishReason, ...]]:
        """As they stand."""
        return tuple(self._endings.counts), tuple(self._endings.reasons)


class DeviceRows:
    """Bookkeeping in tensors: the host reads two flags of the step before, which have arrived by then."""

    def __init__(self, settings: Settings, limits: Sequence[int], device: torch.device) -> None:
        rows = len(limits)
        self._eos = torch.tensor(settings.eos, dtype=torch.int64, device=device)
        self._limits = torch.tensor(limits, device=device)
        self._counts = torch.zeros(rows, dtype=torch.int64, device=device)
        self._reasons = torch.zeros(rows, dtype=torch.int64, device=device)  # index in _REASONS
        self._failure = torch.zeros(rows, dtype=torch.float32, device=device)  # the best score of a failed row, else 0
        self.ended: Tensor | None = torch.zeros(rows, dtype=torch.bool, device=device)
        self._flags = _LateFlags(device)
        self._all_ended = False

    def record(self, tokens: Tensor, best: Tensor, done: Tensor | None) -> None:
        """Queue the work; raise what the step before has found."""
        assert self.ended is not None
        alive = ~self.ended
        failed = alive & ~best.isfinite()
        self._failure = torch.where(failed & (self._failure == 0), best.float(), self._failure)
        self._counts += alive
        end = (tokens[:, None] == self._eos).any(1)
        stop = done & ~end if done is not None else torch.zeros_like(end)
        code = end.long() + 2 * stop.long()
        ends_now = alive & (end | stop | failed | (self._counts >= self._limits))
        self._reasons = torch.where(ends_now, code, self._reasons)
        self.ended = self.ended | ends_now
        all_ended, any_failed = self._flags.exchange(self.ended.all(), (self._failure != 0).any())
        if any_failed:
            self._raise()
        self._all_ended = all_ended

    def _raise(self) -> None:
        failure, counts = self._failure.tolist(), self._counts.tolist()
        failed = {row: value for row, value in enumerate(failure) if value != 0}
        raise no_token(failed, max(0, min(counts[row] for row in failed) - 1))

    def finished(self) -> bool:
        """As of the step before the last."""
        return self._all_ended

    def result(self) -> tuple[tuple[int, ...], tuple[FinishReason, ...]]:
        """Waits for the device."""
        if bool((self._failure != 0).any()):
            self._raise()
        return tuple(self._counts.tolist()), tuple(_REASONS[i] for i in self._reasons.tolist())


class _LateFlags:
    """Hands out the flags of the call before, copied while the device went on."""

    def __init__(self, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._slots = [torch.zeros(2, dtype=torch.bool, pin_memory=pinned) for _ in range(2)]
        self._events = [torch.cuda.Event() for _ in range(2)] if pinned else None  # type: ignore[no-untyped-call]
        self._calls = 0

    def exchange(self, *flags: Tensor) -> tuple[bool, bool]:
        """Queue the copy of two flags; return those of the call before, (False, False) at first."""
        now, before = self._calls % 2, (self._calls + 1) % 2
        self._slots[now].copy_(torch.stack(flags), non_blocking=True)
        if self._events is not None:
            self._events[now].record()
        self._calls += 1
        if self._calls == 1:
            return False, False
        if self._events is not None:
            self._events[before].synchronize()
        first, second = self._slots[before].tolist()
        return first, second
