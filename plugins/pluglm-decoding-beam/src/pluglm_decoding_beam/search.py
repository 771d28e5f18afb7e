"""The loop of all searches of a call: one pass for all beams, then each search goes one token on."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pluglm_decoding_blocks.outputs import Outputs, Recorded

from pluglm.contracts import GenerationOutput
from pluglm.errors import GenerationError
from pluglm_decoding_beam.hypotheses import NOBODY, Ended, Search, ranked
from pluglm_decoding_beam.step import Job, Step


def run(job: Job) -> GenerationOutput:
    """Search until no search can improve. Row (b, g, w) of the batch belongs to beam w of group g of prompt b.

    Returns: rows of one prompt best first. `sequence_scores` are the sums of the tokens' scores as `scores` holds them,
        by (new tokens) ** length_penalty; `beam_indices` say in which rows of `scores` they stand.
    """
    most = max(job.limits)
    width, groups = job.beams.width, job.beams.groups
    searches = [
        [Search(job.beams, limit, (b * groups + g) * width) for g in range(groups)]
        for b, limit in enumerate(job.limits)
    ]
    sequences = job.prompt.ids.repeat_interleave(job.beams.beams, 0)  # [R, S]
    outputs = Outputs(job.settings)
    logits = job.feed.prefill() if most else None
    for count in range(most):
        assert logits is not None
        step = Step(job, searches, sequences, logits, count)
        for group in range(groups):
            step.advance(group)
        outputs.record(logits, step.scores(), job.feed.hidden_states)
        if job.announcer is not None:
            job.announcer.hear(searches)
        if count + 1 == most or all(search.done for row in searches for search in row):
            break
        source, tokens = _moves(searches, job.settings.pad)
        kept = sequences[torch.tensor(source, device=sequences.device)]
        sequences = torch.cat((kept, torch.tensor(tokens, device=sequences.device)[:, None]), dim=1)
        logits = job.feed.step(sequences, source)
    recorded = outputs.result(most)
    output = _output(job, [_best(job, row, number) for number, row in enumerate(searches)], recorded)
    if most:
        job.feed.give(output.sequences, output.num_new_tokens, job.settings.copies)
    return output


def _moves(searches: Sequence[Sequence[Search]], pad: int) -> tuple[list[int], list[int]]:
    """For each row of the batch, the row its new beam continues, and the token. Searches that are done stay put."""
    source: list[int] = []
    tokens: list[int] = []
    for row in searches:
        for search in row:
            for place, beam in enumerate(search.beams):
                nobody = search.done or beam is NOBODY
                source.append(search.first_row + (place if nobody else beam.place))
                tokens.append(pad if nobody else beam.token)
    return source, tokens


def _best(job: Job, row: Sequence[Search], number: int) -> list[Ended]:
    """The best ended hypotheses of a prompt's groups, as many as were asked for."""
    copies = job.settings.copies
    ended = ranked(row)[:copies]
    if not ended and job.guide is not None:
        raise job.guide.stuck((number,), row[0].length)
    if len(ended) < copies:
        raise GenerationError(
            f"row {number} has {len(ended)} hypotheses, and num_return_sequences={copies} were asked for.",
            why="so much is forbidden by processors or filters that there are no more.",
            fix="Ask for fewer sequences, or allow more tokens.", rows=(number,), step=row[0].length,
        )  # fmt: skip
    return ended


def _output(job: Job, found: Sequence[Sequence[Ended]], recorded: Recorded) -> GenerationOutput:
    """The hypotheses as rows: [B * copies, S + new tokens of the longest], the rest padding."""
    prompt, S = job.prompt.repeated(job.settings.copies), job.prompt.width
    ended = [one for row in found for one in row]
    paths = [one.beam.path() for one in ended]
    sequences = prompt.ids.new_full((len(ended), S + max(map(len, paths))), job.settings.pad)
    sequences[:, :S] = prompt.ids
    for i, path in enumerate(paths):
        sequences[i, S : S + len(path)] = torch.tensor([beam.token for beam in path], dtype=torch.int64)
    return GenerationOutput(
        sequences, S, tuple(map(len, paths)), tuple(one.reason for one in ended),
        logprobs=tuple(tuple(beam.logprob for beam in path) for path in paths) if job.settings.logprobs else None,
        sequence_scores=tuple(one.score for one in ended),
        beam_indices=tuple(
            tuple(one.first_row + beam.place for beam in path) for one, path in zip(ended, paths, strict=True)
        ),
        **recorded,
    )  # fmt: skip
