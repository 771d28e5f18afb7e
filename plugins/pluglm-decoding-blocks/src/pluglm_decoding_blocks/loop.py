"""The loop of one token a row and pass: prefill, then choose, record, feed until every row has ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pluglm.contracts import GenerationOutput, StoppingCriterion, Streamer
from pluglm_decoding_blocks.ahead import Ahead
from pluglm_decoding_blocks.endings import Endings
from pluglm_decoding_blocks.feed import Feed
from pluglm_decoding_blocks.outputs import Outputs
from pluglm_decoding_blocks.prompt import Prompt
from pluglm_decoding_blocks.rows import DeviceRows, HostRows, Rows
from pluglm_decoding_blocks.settings import Settings

#: (logits [R, V], sequences [R, S], number of new tokens so far) -> tokens [R], best scores [R], scores [R, V].
Choose = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor]]


@dataclass(frozen=True)
class Job:
    """One call, read and checked.

    Attributes:
        prompt: one row a sequence to be made (copies included). limits: new tokens of each row at most.
        choose: makes a token of each row's logits. criteria: the caller's.
        decode: for stop strings.
        looks_back: whether `choose` reads the sequences. Cutting them out for nothing is a good part of a step's cost.
        ahead: what may make the tokens after the first one, the same that `choose` would; None: nothing.
    """

    settings: Settings
    prompt: Prompt
    limits: tuple[int, ...]
    feed: Feed
    choose: Choose
    criteria: Sequence[StoppingCriterion]
    streamer: Streamer | None
    decode: Callable[[Sequence[int]], str] | None
    looks_back: bool = True
    ahead: Ahead | None = None


def run(job: Job) -> GenerationOutput:
    """Generate. One forward pass a token, several of them in one call where `job.ahead` can make them."""
    most, device = max(job.limits), job.prompt.ids.device
    rows, text = make_rows(job, device), _Text(job, most)
    logprobs = _Logprobs(len(job.limits), most, device) if job.settings.logprobs else None
    outputs, ahead = Outputs(job.settings), job.ahead
    logits = job.feed.prefill() if most else None
    while text.count < most:
        assert logits is not None
        tokens, best, scores = job.choose(logits, text.seen, text.count)
        padded = rows.ended  # rows that ended before this token
        if padded is not None:
            tokens = tokens.masked_fill(padded, job.settings.pad)
        if logprobs is not None:
            logprobs.record(logits, tokens, text.count)
        outputs.record(logits, scores, job.feed.hidden_states)
        text.add(tokens[:, None])
        done = _done(job.criteria, text.so_far, scores) if job.criteria else None
        rows.record(tokens, best, done)
        _tell(job.streamer, tokens, padded)
        logits = None
        while ahead is not None and logits is None and rows.ended is padded and text.count < most:
            assert isinstance(rows, HostRows)
            decoded = ahead.decode(tokens, text.count, rows.room, padded)
            if decoded is None:
                ahead = None
                break
            logits, more = decoded.logits, decoded.token_ids
            if not more.shape[1]:
                break
            tokens = more[:, -1]
            text.add(more)
            rows.record_run(more)
            for column in more.unbind(1) if job.streamer is not None else ():
                _tell(job.streamer, column, padded)
        if rows.finished() or text.count == most:
            break
        if logits is None:
            logits = job.feed.step(text.so_far if job.feed.rereads else tokens[:, None], padded)
    counts, reasons = rows.result()
    sequences = text.result(max(counts))
    job.feed.finish(sequences.shape[1] - 1)
    return GenerationOutput(
        sequences, job.prompt.width, counts, reasons, logprobs.result(counts) if logprobs is not None else None,
        **outputs.result(max(counts)),
    )  # fmt: skip


class _Text:
    """The sequences of a call as they grow, in a buffer that is made once.

    Attributes:
        count: new tokens so far. seen: [R, S + count], where `choose` looks at it; else the prompt.
    """

    def __init__(self, job: Job, most: int) -> None:
        """most: new tokens."""
        prompt = job.prompt.ids
        self._start, self._looks_back, self.count, self.seen = prompt.shape[1], job.looks_back, 0, prompt
        self._ids = torch.full(
            (len(job.limits), self._start + most), job.settings.pad, dtype=torch.int64, device=prompt.device
        )
        self._ids[:, : self._start] = prompt
        # Where nobody reads the sequences before the end, they are put together then.
        self._written = job.looks_back or job.feed.rereads or bool(job.criteria)
        self._made: list[Tensor] = []

    @property
    def so_far(self) -> Tensor:
        """[R, S + count], for a call with someone who reads it."""
        return self._ids[:, : self._start + self.count]

    def add(self, tokens: Tensor) -> None:
        """tokens: [R, n], the next ones."""
        start = self._start + self.count
        self.count += tokens.shape[1]
        if self._written:
            self._ids[:, start : start + tokens.shape[1]] = tokens
        else:
            self._made.append(tokens)
        if self._looks_back:
            self.seen = self.so_far

    def result(self, count: int) -> Tensor:
        """[R, S + count]."""
        if self._made:
            made = torch.cat(self._made, dim=1)
            self._ids[:, self._start : self._start + made.shape[1]] = made
        return self._ids[:, : self._start + count]


def _tell(streamer: Streamer | None, tokens: Tensor, padded: Tensor | None) -> None:
    """One step's tokens [R]; -1 for rows that ended before."""
    if streamer is not None:
        streamer.put(tokens if padded is None else tokens.masked_fill(padded, -1))


def make_rows(job: Job, device: torch.device) -> Rows:
    """Bookkeeping on the device where nothing needs the ids on the host and a step too many can be taken back."""
    late = job.feed.can_take_back() and job.ahead is None
    if device.type != "cpu" and job.streamer is None and not job.settings.stop and late:
        return DeviceRows(job.settings, job.limits, device)
    return HostRows(Endings(job.settings, job.limits, job.decode), device)


def _done(criteria: Sequence[StoppingCriterion], sequences: Tensor, scores: Tensor) -> Tensor | None:
    done: Tensor | None = None
    for criterion in criteria:
        ends = criterion(sequences, scores).to(sequences.device, torch.bool)
        done = ends if done is None else done | ends
    return done


class _Logprobs:
    """Log-probabilities of the chosen tokens under the model itself: before processors and temperature, float32."""

    def __init__(self, rows: int, most: int, device: torch.device) -> None:
        self._values = torch.zeros(rows, most, device=device)

    def record(self, logits: Tensor, tokens: Tensor, count: int) -> None:
        """logits: [R, V] as the model gave them."""
        wide = logits.float()
        self._values[:, count] = wide.gather(1, tokens[:, None])[:, 0] - wide.logsumexp(-1)

    def result(self, counts: Sequence[int]) -> tuple[tuple[float, ...], ...]:
        """As in GenerationOutput."""
        return tuple(tuple(row[:count]) for row, count in zip(self._values.tolist(), counts, strict=True))
