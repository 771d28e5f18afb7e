"""A streamer hears what is certain, as soon as it is, and in the end the best text of each prompt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pluglm_decoding_beam.certain import Announcer
from pluglm_decoding_beam.hypotheses import Search
from torch import Tensor

from pluglm.contracts import GenerationOutput
from pluglm.testing.decoding import Recorder
from pluglm.testing.scripted_model import ScriptedModel

Run = Callable[..., GenerationOutput]

PROMPTS = [(2, 4, 3), (7, 8, 9), (3, 3, 3)]
SAID: dict[str, dict[str, Any]] = {
    "beam": {"num_beams": 4, "num_return_sequences": 3},
    "beam-sampling": {"num_beams": 3, "seed": 5, "temperature": 1.5},
    "diverse-beam": {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 1.0},
    "constrained-beam": {"num_beams": 4, "force_words_ids": [[5, 6], [9]]},
}


class Watched(Recorder):
    """Also how many passes the model had made at each step."""

    def __init__(self, model: ScriptedModel) -> None:
        super().__init__()
        self._model = model
        self.passes: list[int] = []

    def put(self, token_ids: Tensor) -> None:
        super().put(token_ids)
        self.passes.append(len(self._model.fed))


@pytest.mark.parametrize("name", SAID)
@pytest.mark.parametrize("ends", [(), (1, 2, 10, 11)])
def test_the_best_texts_are_streamed_exactly(name: str, ends: tuple[int, ...], run: Run) -> None:
    model = ScriptedModel(23)
    streamer = Watched(model)
    said: dict[str, Any] = {"eos_token_id": ends, "max_new_tokens": 14, **SAID[name]}
    output = run(name, model, PROMPTS, streamer=streamer, **said)
    copies = said.get("num_return_sequences", 1)
    counts = output.num_new_tokens[::copies]
    best = output.sequences[::copies, output.prompt_length :][:, : max(counts)]
    over = torch.arange(max(counts)) >= torch.tensor(counts)[:, None]
    assert torch.equal(torch.tensor(streamer.steps).T, best.masked_fill(over, -1))
    assert streamer.ends == 1
    assert torch.equal(output.sequences, run(name, ScriptedModel(23), PROMPTS, **said).sequences)


def test_tokens_are_told_before_the_end(run: Run) -> None:
    model = ScriptedModel(23)
    streamer = Watched(model)
    output = run("beam", model, PROMPTS[:1], num_beams=3, max_new_tokens=30, streamer=streamer)
    assert len(streamer.steps) == output.num_new_tokens[0] == 30
    early = sum(made < 30 for made in streamer.passes)
    assert early > 10
    assert all(made > step for step, made in enumerate(streamer.passes))  # a pass for each token, at least


def test_what_is_told_is_what_all_that_could_win_have_in_common(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Looked at from outside, step by step, with whole texts."""
    streamer = Recorder()
    hear = Announcer.hear
    seen = []

    def looked_at(self: Announcer, searches: list[list[Search]]) -> None:
        hear(self, searches)
        (search,) = searches[0]
        texts = [] if search.done else [beam.tokens() for beam in search.beams if beam.score > -torch.inf]
        texts += [one.beam.tokens() for one in search.ended[:1]]
        common = 0
        while all(len(text) > common for text in texts) and len({text[common] for text in texts}) == 1:
            common += 1
        seen.append((len(streamer.steps), common))

    monkeypatch.setattr(Announcer, "hear", looked_at)
    run("beam", ScriptedModel(23), PROMPTS[:1], num_beams=4, max_new_tokens=25, eos_token_id=(1, 2), streamer=streamer,
        early_stopping="never")  # fmt: skip
    assert [told for told, _ in seen] == [common for _, common in seen]
    assert len({told for told, _ in seen}) > 2


def test_a_token_waits_for_the_slowest_prompt(run: Run) -> None:
    """Of one prompt every token is certain at once; the other's first words are open for long."""
    from pluglm.testing.scripted_model import CERTAIN

    def sure(h: tuple[int, ...]) -> dict[int, float]:
        return {} if h[0] == 2 else {5: CERTAIN, 1: -CERTAIN}

    alone, both = Recorder(), Recorder()
    said: dict[str, Any] = {"num_beams": 3, "max_new_tokens": 12}
    slow = run("beam", ScriptedModel(23, sure), PROMPTS[:1], streamer=alone, **said)
    run("beam", ScriptedModel(23, sure), PROMPTS[:2], streamer=both, **said)
    assert both.steps == [[token, 5] for token in slow.completion(0)]


def test_no_new_tokens_are_told_as_none(run: Run) -> None:
    streamer = Recorder()
    run("beam", ScriptedModel(23), PROMPTS, num_beams=2, max_new_tokens=0, streamer=streamer)
    assert (streamer.steps, streamer.ends) == ([], 1)
