"""Several tokens from one call of the executor, where nothing needs logits or text between them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from time import perf_counter
from typing import Any

from torch import Tensor

from pluglm.contracts import Decoded, DecodeRun, DecodesAhead, Draw, StoppingCriterion, Streamer
from pluglm_decoding_blocks.feed import CachedFeed, Feed
from pluglm_decoding_blocks.settings import Settings
from pluglm_decoding_blocks.source import encoder_source

#: Tokens of one call at most, and seconds that it may take: an interrupt waits for its end.
MOST, SECONDS = 128, 0.5
#: The same while somebody reads along.
MOST_STREAMED, SECONDS_STREAMED = 4, 0.02


class Ahead:
    """Asks an executor for runs of tokens, as long as they may be.

    Args:
        draw: None: greedy. `first` is filled in. streamed: tokens are waited for.
    """

    def __init__(
        self, executor: DecodesAhead, feed: CachedFeed, settings: Settings, draw: Draw | None, *, streamed: bool
    ) -> None:
        self._decode, self._feed, self._draw = executor.decode, feed, draw
        self._ends, self._pad = settings.eos, settings.pad
        self._most, self._seconds = (MOST_STREAMED, SECONDS_STREAMED) if streamed else (MOST, SECONDS)
        self._count = 1  # how long a token takes is not known yet

    def decode(self, tokens: Tensor, number: int, room: int, ended: Tensor | None) -> Decoded | None:
        """The next tokens, until a row ends. None: this executor cannot, now or later.

        Args:
            tokens: [R] the last ones, not fed yet. number: of the first new token. room: new tokens at most.
            ended: [R] bool, rows that ended before `tokens`, and no row has ended with them.
        """
        started, draw = perf_counter(), self._draw
        decoded = self._decode(DecodeRun(
            tokens[:, None], self._feed.cache, min(self._count, room), self._ends,
            None if ended is None else tuple(ended.tolist()), self._pad,
            holes=self._feed.given, draw=None if draw is None else replace(draw, first=number),
        ))  # fmt: skip
        if decoded is not None and (made := decoded.token_ids.shape[1]):
            took = perf_counter() - started
            self._count = max(1, min(self._most, int(self._seconds * made / took)))
        return decoded


def make_ahead(
    model: Any, feed: Feed, settings: Settings, criteria: Sequence[StoppingCriterion], streamer: Streamer | None,
    draw: Draw | None,
) -> Ahead | None:  # fmt: skip
    """None where the executor chooses no tokens, or where something is to be seen of every one of them.

    The caller has made sure that scores are the logits, or what `draw` makes of them.
    """
    executor = getattr(model, "executor", None)
    if not isinstance(executor, DecodesAhead) or not isinstance(feed, CachedFeed) or not feed.plain:
        return None
    recorded = settings.logprobs or settings.scores or settings.logits or settings.hidden_states
    if recorded or settings.stop or criteria or encoder_source(model) is not None:
        return None
    if streamer is not None and feed.given:
        return None  # where the streamer ends the call, the cache would hold tokens that nobody has seen
    return Ahead(executor, feed, settings, draw, streamed=streamer is not None)
