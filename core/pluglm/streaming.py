"""Tokens of a running generation as an iterator, for any strategy: it runs in a thread and ends when that is closed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_END = object()


class QueueStreamer:
    """Hands the tokens of row 0 to another thread. `room` bounds how far the generation may run ahead."""

    def __init__(self, room: int = 64) -> None:
        self.tokens: queue.Queue[Any] = queue.Queue(maxsize=room)
        self.cancelled = threading.Event()

    def put(self, token_ids: Tensor) -> None:
        """[B] ids of one step; waits while the reader is `room` tokens behind."""
        self._offer(int(token_ids[0]))

    def end(self) -> None:
        """The strategy's end is told by the thread's; nothing to do here."""

    def _offer(self, item: Any) -> None:
        while not self.cancelled.is_set():
            try:
                self.tokens.put(item, timeout=0.1)
                return
            except queue.Full:
                continue


def stream_tokens(strategy: Any, model: Any, input_ids: Tensor, arguments: Mapping[str, Any]) -> Iterator[int]:
    """Run `strategy` on one row and yield its new token ids as they come.

    Args:
        arguments: keyword arguments of the strategy; a stopping criterion that ends a closed stream is added.
    Raises: what the strategy raises, in the reader's thread, after the tokens that came before.
    """
    streamer = QueueStreamer()

    def closed(ids: Tensor, _: Tensor | None) -> Tensor:
        return torch.full((ids.shape[0],), streamer.cancelled.is_set(), dtype=torch.bool, device=ids.device)

    criteria = [*(arguments.get("stopping_criteria") or ()), closed]
    failure: list[BaseException] = []

    def work() -> None:
        try:
            with torch.no_grad():
                strategy(model, input_ids, **{**arguments, "stopping_criteria": criteria, "streamer": streamer})
        except BaseException as e:  # noqa: BLE001 - handed to the reader, who raises it
            failure.append(e)
        finally:
            streamer._offer(_END)

    thread = threading.Thread(target=work, name="pluglm-stream", daemon=True)
    thread.start()
    try:
        while (item := streamer.tokens.get()) is not _END:
            yield item
        if failure:
            raise failure[0]
    finally:
        streamer.cancelled.set()
        thread.join()
