"""The loop of one token a row and pass: prefill, then choose, record, feed until every row has ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pluglm.contracts import GenerationOutput, StoppingCriterion, Streamer
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


def run(job: Job) -> GenerationOutput:
    """Generate. One forward pass a token; the ids lie in a buffer that is made once."""
    S, most = job.prompt.width, max(job.limits)
    device = job.prompt.ids.device
    rows = make_rows(job, device)
    sequences = torch.full((len(job.limits), S + most), job.settings.pad, dtype=torch.int64, device=device)
    sequences[:, :S] = job.prompt.ids
    logprobs = _Logprobs(len(job.limits), most, device) if job.settings.logprobs else None
    outputs = Outputs(job.settings)
    looks_back, rereads = job.looks_back, job.feed.rereads
    # Where nobody reads the sequences before the end, they are put together then.
    written, made = looks_back or rereads or bool(job.criteria), []
    text = job.prompt.ids
    logits = job.feed.prefill() if most else None
    for count in range(most):
        assert logits is not None
        end = S + count + 1
        if looks_back:
            text = sequences[:, : end - 1]
        tokens, best, scores = job.choose(logits, text, count)
        padded = rows.ended  # rows that ended before this token
        if padded is not None:
            tokens = tokens.masked_fill(padded, job.settings.pad)
        if written:
            sequences[:, end - 1] = tokens
        else:
            made.append(tokens)
        if logprobs is not None:
            logprobs.record(logits, tokens, count)
        outputs.record(logits, scores, job.feed.hidden_states)
        done = _done(job.criteria, sequences[:, :end], scores) if job.criteria else None
        rows.record(tokens, best, done)
        if job.streamer is not None:
            job.streamer.put(tokens if padded is None else tokens.masked_fill(padded, -1))
        if rows.finished() or count + 1 == most:
            break
        logits = job.feed.step(sequences[:, :end] if rereads else tokens[:, None], padded)
    if made:
        sequences[:, S : S + len(made)] = torch.stack(made, dim=1)
    counts, reasons = rows.result()
    width = S + max(counts)
    job.feed.finish(width - 1)
    return GenerationOutput(
        sequences[:, :width], S, counts, reasons, logprobs.result(counts) if logprobs is not None else None,
        **outputs.result(max(counts)),
    )  # fmt: skip


def make_rows(job: Job, device: torch.device) -> Rows:
    """Bookkeeping on the device where nothing needs the ids on the host and a step too many can be taken back."""
    late = job.feed.can_take_back()
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
