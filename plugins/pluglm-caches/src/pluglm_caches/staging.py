"""The way of offloaded cells to an accelerator and back: two buffers in turn, filled while another layer computes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from pluglm_caches.stores import Pass, zeros


class Streams(Protocol):
    """The order of work on an accelerator: what computes, and beside it what copies."""

    def copy(self, act: Callable[[], object]) -> Any:
        """Run the copies of `act` beside the computation, after the copies before and all work given out so far.

        Returns: a mark of their end.
        """
        ...

    def wait(self, mark: Any) -> None:
        """The computation goes on after the mark."""
        ...

    def finish(self) -> None:
        """Return when every copy has ended."""
        ...


class CudaStreams:
    """Copies on a stream of their own."""

    def __init__(self, device: torch.device) -> None:
        self._side: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def copy(self, act: Callable[[], object]) -> torch.cuda.Event:
        self._side.wait_stream(torch.cuda.current_stream(self._side.device))
        with torch.cuda.stream(self._side):
            act()
        mark: torch.cuda.Event = self._side.record_event()
        return mark

    def wait(self, mark: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._side.device).wait_event(mark)

    def finish(self) -> None:
        self._side.synchronize()


class Staging:
    """Buffers on the accelerator that the slots of one cache pass through, one after another.

    While layer i computes in one buffer, the cells of layer i + 1 arrive in the other. A slot that a later layer reads
    again has a buffer of its own.

    Args:
        slots: those that pass through, in the order of their layers. shared: those that others read.
    """

    def __init__(
        self, slots: Sequence[int], shared: frozenset[int], streams: Streams, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.slots, self.shared, self.streams, self.dtype, self.device = slots, shared, streams, dtype, device
        rotating = [slot for slot in slots if slot not in shared]
        self._place = {slot: at % 2 for at, slot in enumerate(rotating)}
        self._place |= {slot: 2 + at for at, slot in enumerate(sorted(shared))}
        self._buffers = [zeros((0,), dtype, device)] * (2 + len(shared))
        #: Of each buffer: (pass, slot) whose cells are in it or on their way, and the mark of their arrival.
        self._content: list[tuple[Pass | None, int, Any]] = [(None, -1, None)] * len(self._buffers)
        # A buffer that is given back while a copy writes into it would be somebody else's by then.
        weakref.finalize(self, streams.finish).atexit = False

    def fetch(self, slot: int, host: Tensor, current: Pass) -> None:
        """Begin to bring a slot's committed cells, after all work on the buffer before. host: [room, numbers]."""
        place = self._place[slot]
        if self._content[place][:2] == (current, slot):
            return
        needed = current.end * host.shape[1]
        if self._buffers[place].shape[0] < needed:
            self.streams.finish()  # a copy out of the old buffer may be under way
            self._buffers[place] = zeros((needed + needed // 2,), self.dtype, self.device)
        held = current.start
        target = self._cells(place, held, host.shape[1])
        mark = self.streams.copy(lambda: target.copy_(host[:held], non_blocking=True))
        self._content[place] = (current, slot, mark)

    def arrived(self, slot: int, host: Tensor, current: Pass) -> Tensor:
        """[start + count, numbers] with the committed cells of a slot in it; the computation waits for them."""
        self.fetch(slot, host, current)
        place = self._place[slot]
        self.streams.wait(self._content[place][2])
        return self._cells(place, current.end, host.shape[1])

    def store(self, fresh: Tensor, host: Tensor) -> None:
        """Copy a pass's cells [T, numbers] to their place on the host, after the work that computes them."""
        self.streams.copy(lambda: host.copy_(fresh, non_blocking=True))

    def held(self, slot: int, numbers: int, current: Pass) -> Tensor | None:
        """What `arrived` gave in this pass, if it is still there."""
        place = self._place[slot]
        if self._content[place][:2] != (current, slot):
            return None
        return self._cells(place, current.end, numbers)

    def _cells(self, place: int, cells: int, numbers: int) -> Tensor:
        return self._buffers[place].narrow(0, 0, cells * numbers).view(cells, numbers)

    def forget(self) -> None:
        """After copies that were under way: what the buffers hold counts for nothing."""
        self.streams.finish()
        self._content = [(None, -1, None)] * len(self._buffers)

    def another(self) -> Staging:
        """For a fork: buffers of its own, the same streams."""
        return Staging(self.slots, self.shared, self.streams, self.dtype, self.device)

    def tensors(self) -> Sequence[Tensor]:
        """Everything that occupies memory."""
        return self._buffers
