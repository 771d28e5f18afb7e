"""Streamers: text as it is made, printed or handed to another thread; never half a character."""

from __future__ import annotations

import asyncio
import queue
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pluglm.errors import InputError
from pluglm.text_stream import TextStream

if TYPE_CHECKING:
    from torch import Tensor

_END = object()


class BaseStreamer:
    """Told of token ids: the prompt first, then each step's. What one's own streamers derive from."""

    def put(self, value: Tensor) -> None:
        """value: [1, S] the prompt, then [1] the next token."""
        raise NotImplementedError(f"{type(self).__name__} does not say what to do with tokens: it has no put.")

    def end(self) -> None:
        """Nothing more will come."""
        raise NotImplementedError(f"{type(self).__name__} does not say what to do at the end: it has no end.")


class TextStreamer(BaseStreamer):
    """Prints whole characters as soon as they are complete; the reference waits for the next space.

    Args:
        tokenizer: decodes. skip_prompt: leave the prompt out. **decode_kwargs: of `tokenizer.decode`.
    """

    def __init__(self, tokenizer: Any, skip_prompt: bool = False, **decode_kwargs: Any) -> None:
        self.tokenizer, self.skip_prompt, self.decode_kwargs = tokenizer, skip_prompt, decode_kwargs
        self.next_tokens_are_prompt = True
        self._text = self._new_text()

    def put(self, value: Tensor) -> None:
        """See `BaseStreamer.put`. Raises InputError for more than one row."""
        if value.ndim > 1 and value.shape[0] > 1:
            raise InputError(
                f"a streamer of text carries one row, this call has {value.shape[0]}.",
                why="pieces of several texts would run into each other.",
                fix="Generate them one by one; or use pluglm's lm.stream_batch, whose pieces name their row.",
                argument="streamer",
            )  # fmt: skip
        prompt, self.next_tokens_are_prompt = self.next_tokens_are_prompt, False
        if prompt and self.skip_prompt:
            return
        piece = "".join(self._text.push(int(token)) for token in value.reshape(-1).tolist())
        if piece:
            self.on_finalized_text(piece)

    def end(self) -> None:
        """What was held back, half characters included. The streamer may then be used again."""
        piece = self._text.finish()
        self._text, self.next_tokens_are_prompt = self._new_text(), True
        self.on_finalized_text(piece, stream_end=True)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Prints; a subclass may do something else."""
        sys.stdout.write(text + ("\n" if stream_end else ""))
        sys.stdout.flush()

    def _new_text(self) -> TextStream:
        def decode(ids: Sequence[int]) -> str:
            text: str = self.tokenizer.decode(list(ids), **self.decode_kwargs)
            return text

        return TextStream(decode)


class TextIteratorStreamer(TextStreamer):
    """Hands pieces to another thread, which iterates over it.

    Args:
        timeout: seconds to wait for a piece before `queue.Empty` is raised; None: for ever. Others: as above.
    """

    def __init__(
        self, tokenizer: Any, skip_prompt: bool = False, timeout: float | None = None, **decode_kwargs: Any
    ) -> None:  # fmt: skip
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.timeout = timeout
        self.text_queue: queue.Queue[Any] = queue.Queue()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Puts the piece, and at the end a sign."""
        self.text_queue.put(text, timeout=self.timeout)
        if stream_end:
            self.text_queue.put(_END, timeout=self.timeout)

    def __iter__(self) -> TextIteratorStreamer:
        return self

    def __next__(self) -> str:
        piece = self.text_queue.get(timeout=self.timeout)
        if piece is _END:
            raise StopIteration
        text: str = piece
        return text


class AsyncTextIteratorStreamer(TextStreamer):
    """As `TextIteratorStreamer`, for `async for`. Made inside the loop that iterates; the model runs in a thread."""

    def __init__(
        self, tokenizer: Any, skip_prompt: bool = False, timeout: float | None = None, **decode_kwargs: Any
    ) -> None:  # fmt: skip
        super().__init__(tokenizer, skip_prompt, **decode_kwargs)
        self.timeout = timeout
        self.text_queue: asyncio.Queue[Any] = asyncio.Queue()
        self.loop = asyncio.get_running_loop()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Puts the piece, and at the end a sign, from the model's thread."""
        self.loop.call_soon_threadsafe(self.text_queue.put_nowait, text)
        if stream_end:
            self.loop.call_soon_threadsafe(self.text_queue.put_nowait, _END)

    def __aiter__(self) -> AsyncTextIteratorStreamer:
        return self

    async def __anext__(self) -> str:
        piece = await asyncio.wait_for(self.text_queue.get(), self.timeout)
        if piece is _END:
            raise StopAsyncIteration
        text: str = piece
        return text
