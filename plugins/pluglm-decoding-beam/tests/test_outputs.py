"""What a search hands out beside the texts: scores, their rows, logits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from pluglm.contracts import GenerationOutput
from pluglm.errors import InputError
from pluglm.testing.scripted_model import ScriptedModel

Run = Callable[..., GenerationOutput]

PROMPTS = [(2, 4, 3), (7, 8, 9)]
SAID: dict[str, dict[str, Any]] = {
    "beam": {"num_beams": 4, "repetition_penalty": 1.3},
    "beam-sampling": {"num_beams": 3, "seed": 5, "temperature": 1.5, "top_k": 6, "typical_p": 0.9},
    "diverse-beam": {"num_beams": 6, "num_beam_groups": 3, "diversity_penalty": 0.8},
    "constrained-beam": {"num_beams": 4, "force_words_ids": [[5, 6], [9]]},
}


@pytest.mark.parametrize("name", SAID)
@pytest.mark.parametrize("penalty", [1.0, 0.3])
def test_transition_scores_add_up_to_the_sequence_score(name: str, penalty: float, run: Run) -> None:
    output = run(
        name, ScriptedModel(23), PROMPTS, **SAID[name], num_return_sequences=2, max_new_tokens=9, output_scores=True,
        eos_token_id=(1, 2, 3, 4), length_penalty=penalty,
    )  # fmt: skip
    assert output.scores is not None
    assert output.beam_indices is not None
    assert output.sequence_scores is not None
    assert output.logits is None
    assert output.scores[0].shape == (2 * SAID[name]["num_beams"], 23)
    assert len(output.scores) >= max(output.num_new_tokens)
    for row in range(4):
        completion, rows = output.completion(row), output.beam_indices[row]
        transitions = [float(output.scores[t][rows[t], token]) for t, token in enumerate(completion)]
        assert output.sequence_scores[row] == pytest.approx(sum(transitions) / len(completion) ** penalty, rel=1e-5)
        assert {r // SAID[name]["num_beams"] for r in rows} == {row // 2}
    assert len({index for rows in output.beam_indices for index in rows}) > 2


def test_nothing_is_recorded_unasked(run: Run) -> None:
    output = run("beam", ScriptedModel(23), PROMPTS, num_beams=3)
    assert (output.scores, output.logits, output.logprobs) == (None, None, None)
    assert output.sequence_scores is not None
    assert output.beam_indices is not None


def test_logits_are_the_models_of_the_row_that_a_token_came_from(run: Run) -> None:
    model = ScriptedModel(23)
    output = run("beam", model, PROMPTS, num_beams=4, num_return_sequences=4, max_new_tokens=6, eos_token_id=1,
                 output_logits=True, repetition_penalty=1.5, return_logprobs=True)  # fmt: skip
    assert output.logits is not None
    assert output.beam_indices is not None
    assert output.logprobs is not None
    for row in range(8):
        history = PROMPTS[row // 4]
        for t, (token, index) in enumerate(zip(output.completion(row), output.beam_indices[row], strict=True)):
            assert output.logits[t][index].tolist() == pytest.approx(model.scores(history))
            said = output.logits[t][index].log_softmax(-1)[token]
            assert output.logprobs[row][t] == pytest.approx(float(said), abs=1e-6)
            history = (*history, token)


def test_filters_leave_each_beam_one_token_more_than_can_end_it(run: Run) -> None:
    for said in ({"top_k": 1}, {"top_p": 0.01}, {"min_p": 1.0}, {"top_k": 1, "top_p": 0.1, "min_p": 0.9}):
        output = run("beam-sampling", ScriptedModel(23), PROMPTS, num_beams=3, eos_token_id=(1, 2), output_scores=True,
                     seed=3, max_new_tokens=3, **said)  # fmt: skip
        assert output.scores is not None
        for scores in output.scores:
            assert ((scores > -math.inf).sum(1) == 3).all()


def test_flags_are_flags(run: Run) -> None:
    for name in ("output_scores", "output_logits"):
        with pytest.raises(InputError, match=f"{name}='yes' makes no sense"):
            run("beam", ScriptedModel(23), PROMPTS, **{name: "yes"})
