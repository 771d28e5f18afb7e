"""Tokens of a running generation as an iterator, for any strategy: it runs in a thread and ends when that is closed."""

from __future__ import annotations

import asyncio
import atexit
import queue
import threading
from collections.abc import AsyncGenerator, Generator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_END = object()


class QueueStreamer:
    """Hands tokens to another thread. `room` bounds how many steps the generation may run ahead."""

    def __init__(self, room: int = 64) -> None:
        self.steps: queue.Queue[Any] = queue.Queue(maxsize=room)
        self.cancelled = threading.Event()

    def put(self, token_ids: Tensor) -> None:
        """[B] ids of one step; waits while the reader is `room` steps behind."""
        self._offer(token_ids.tolist())

    def end(self) -> None:
        """The strategy's end is told by the thread's; nothing to do here."""

    def _offer(self, item: Any) -> None:
        while not self.cancelled.is_set():
            try:
                self.steps.put(item, timeout=0.1)
                return
            except queue.Full:
                continue


def stream_tokens(
    strategy: Any, model: Any, input_ids: Tensor, arguments: Mapping[str, Any]
) -> Generator[list[int], None, None]:
    """Run `strategy` and yield what each step brings as it comes: a token id a row, -1 for a row that has ended.

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

    def stop() -> None:
        streamer.cancelled.set()
        thread.join()

    # A reader that an exception ends may still hold this iterator when the interpreter goes down under the thread.
    atexit.register(stop)
    thread.start()
    try:
        while (item := streamer.steps.get()) is not _END:
            yield item
        if failure:
            raise failure[0]
    finally:
        atexit.unregister(stop)
        stop()


async def in_background(iterator: Generator[T, None, None]) -> AsyncGenerator[T, None]:
    """The items of a blocking iterator, for an event loop: each is waited for in a thread.

    Leaving the loop early, or cancelling the task, closes `iterator` – after the item that is being made, and without
    the event loop waiting for it.
    """
    loop = asyncio.get_running_loop()
    one = ThreadPoolExecutor(1, thread_name_prefix="pluglm-async")  # one thread: items come, and it ends, in order
    try:
        while (item := await loop.run_in_executor(one, next, iterator, _END)) is not _END:
            yield item  # type: ignore[misc]
    finally:
        one.submit(iterator.close)
        one.shutdown(wait=False)
