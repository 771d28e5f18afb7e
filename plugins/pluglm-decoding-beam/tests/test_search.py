"""What a search finds, returns and leaves behind."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pluglm.contracts import GenerationOutput
from pluglm.errors import GenerationError, InputError, UnsupportedRequestError
from pluglm.testing.decoding import Recorder, never_ends, text
from pluglm.testing.scripted_model import CERTAIN, ScriptedModel

Run = Callable[..., GenerationOutput]

V, EOS, PROMPT = 6, 1, (2, 4, 3)


def logprobs(model: ScriptedModel, history: tuple[int, ...]) -> list[float]:
    found: list[float] = torch.tensor(model.scores(history)).log_softmax(-1).tolist()
    return found


def likelihood(model: ScriptedModel, tokens: tuple[int, ...]) -> float:
    return sum(logprobs(model, PROMPT + tokens[:i])[token] for i, token in enumerate(tokens))


@pytest.mark.parametrize("penalty", [1.0, 0.0, 2.5, -1.0])
def test_a_search_wide_enough_for_every_text_finds_the_best_of_all(penalty: float, run: Run) -> None:
    model, longest = ScriptedModel(V), 3
    others = [token for token in range(V) if token != EOS]
    texts = [
        (*head, last)
        for length in range(1, longest + 1)
        for head in itertools.product(others, repeat=length - 1)
        for last in (range(V) if length == longest else (EOS,))
    ]
    ranked = sorted(((likelihood(model, t) / len(t) ** penalty, t) for t in texts), reverse=True)
    output = run(
        "beam", model, [PROMPT], num_beams=200, num_return_sequences=7, max_new_tokens=longest, eos_token_id=EOS,
        length_penalty=penalty, early_stopping="never",
    )  # fmt: skip
    assert [tuple(output.completion(i)) for i in range(7)] == [t for _, t in ranked[:7]]
    assert output.sequence_scores == pytest.approx([score for score, _ in ranked[:7]], abs=1e-5)


def test_a_score_is_the_sum_of_log_probabilities_by_the_number_of_new_tokens(run: Run) -> None:
    model = ScriptedModel(23)
    output = run(
        "beam", model, [PROMPT, (*PROMPT[:2], 0)], attention_mask=torch.tensor([[1, 1, 1], [1, 1, 0]]), num_beams=5,
        num_return_sequences=5, eos_token_id=(1, 2, 3), length_penalty=0.7, return_logprobs=True,
    )  # fmt: skip
    assert output.logprobs is not None
    assert len(set(output.num_new_tokens)) > 1
    for row, (said, score) in enumerate(zip(output.logprobs, output.sequence_scores, strict=True)):
        assert score == pytest.approx(sum(said) / len(said) ** 0.7, rel=1e-5)
        history = (PROMPT, PROMPT[:2])[row // 5]
        for token, logprob in zip(output.completion(row), said, strict=True):
            assert logprob == pytest.approx(logprobs(model, history)[token], abs=1e-5)
            history = (*history, token)


def test_one_pass_a_token_serves_all_beams_of_all_prompts(run: Run) -> None:
    model = ScriptedModel(23, never_ends)
    run("beam", model, [PROMPT, PROMPT], num_beams=4, max_new_tokens=6, eos_token_id=EOS)
    assert model.fed == [3, 1, 1, 1, 1, 1]
    assert [cache.batch_size for cache in model.caches] == [8]


def test_early_stopping_ends_a_search_as_soon_as_it_holds_a_hypothesis_for_each_beam(run: Run) -> None:
    def passes(early: object) -> int:
        model = ScriptedModel(23)
        run("beam", model, [PROMPT], num_beams=3, max_new_tokens=30, eos_token_id=tuple(range(1, 9)),
            early_stopping=early, length_penalty=1.0)  # fmt: skip
        return len(model.fed)

    assert passes(True) < passes(False) < passes("never")


def test_a_given_cache_keeps_every_returned_sequence_and_can_be_continued(run: Run) -> None:
    model = ScriptedModel(23)
    prompts = [PROMPT, (7, 8, 9)]
    said: dict[str, Any] = {"num_beams": 4, "num_return_sequences": 2, "eos_token_id": tuple(range(1, 7))}
    cache = model.new_cache(batch_size=2)
    output = run("beam", model, prompts, past_key_values=cache, **said)
    assert torch.equal(output.sequences, run("beam", model, prompts, **said).sequences)
    assert len(set(output.num_new_tokens)) > 1
    assert (cache.batch_size, cache.length) == (4, output.sequences.shape[1] - 1)
    for row in range(4):
        kept = (*prompts[row // 2], *output.completion(row))
        assert cache.history(row, cache.length) == kept[: cache.length]


def test_a_given_cache_holds_the_prompt_alone_after_a_failure(run: Run) -> None:
    model = ScriptedModel(23, lambda h: {4: float("nan")} if len(h) == 5 else {})
    cache, streamer = model.new_cache(batch_size=1), Recorder()
    with pytest.raises(GenerationError, match="not finite") as caught:
        run("beam", model, [PROMPT], past_key_values=cache, num_beams=3, streamer=streamer)
    assert (caught.value.rows, caught.value.step) == ((0,), 2)
    assert (cache.batch_size, cache.history(0, cache.length)) == (1, PROMPT)
    assert (streamer.steps, streamer.ends) == ([], 1)


def test_a_given_cache_whose_search_cannot_be_undone_is_refused(run: Run) -> None:
    model = ScriptedModel(23, operations=frozenset({"reorder", "repeat", "select"}))
    with pytest.raises(InputError, match="has no crop") as caught:
        run("beam", model, [PROMPT], past_key_values=model.new_cache(batch_size=1))
    assert caught.value.argument == "past_key_values"


def test_a_layout_that_cannot_move_rows_is_refused_and_no_cache_is_needed(run: Run) -> None:
    model = ScriptedModel(23, operations=frozenset({"crop"}))
    with pytest.raises(UnsupportedRequestError, match="lacks reorder and repeat") as caught:
        run("beam", model, [PROMPT])
    assert "use_cache=False" in caught.value.fix
    without = run("beam", model, [PROMPT], use_cache=False)
    assert torch.equal(without.sequences, run("beam", ScriptedModel(23), [PROMPT]).sequences)


def test_everything_forbidden_is_an_error_that_names_the_prompt(run: Run) -> None:
    def forbids(ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill((ids[:, :1] == 9), -torch.inf)

    with pytest.raises(GenerationError, match="every token is forbidden for row 1 at new token 0"):
        run("beam", ScriptedModel(23), [PROMPT, (9, 8, 7)], logits_processor=[forbids])


def test_fewer_hypotheses_than_were_asked_for_are_an_error(run: Run) -> None:
    def only_five(_: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([5]), 0.0)

    said: dict[str, Any] = {"logits_processor": [only_five], "num_beams": 3, "max_new_tokens": 4}
    assert run("beam", ScriptedModel(23), [PROMPT], **said).completion(0) == [5, 5, 5, 5]
    with pytest.raises(GenerationError, match="row 0 has 1 hypotheses, and num_return_sequences=2") as caught:
        run("beam", ScriptedModel(23), [PROMPT], num_return_sequences=2, **said)
    assert caught.value.rows == (0,)


def test_no_hypothesis_goes_on_behind_a_stop_string(run: Run) -> None:
    output = run("beam", ScriptedModel(V), [PROMPT], num_beams=4, num_return_sequences=4, max_new_tokens=8,
                 stop_strings=("ab", "ff", "c"), min_new_tokens=2)  # fmt: skip
    assert "stop" in output.finish_reasons
    for row, reason in enumerate(output.finish_reasons):
        said = text(output.completion(row))
        assert any(stop in said for stop in ("ab", "ff", "c")) == (reason == "stop")
        assert len(said) >= 2
        assert not any(stop in said[:-1] for stop in ("ab", "ff", "c")) or len(said) == 2


def test_a_criterion_sees_candidates_and_ends_them(run: Run) -> None:
    shapes = []

    def odd_ends(ids: Tensor, scores: Tensor | None) -> Tensor:
        shapes.append((tuple(ids.shape), scores))
        return ids[:, -1] % 2 == 1

    output = run("beam", ScriptedModel(23), [PROMPT, PROMPT], num_beams=3, stopping_criteria=[odd_ends])
    assert shapes[0] == ((2 * 2 * 3, 4), None)
    assert all(token % 2 == 0 for row in range(2) for token in output.completion(row)[:-1])


def test_a_certain_text_is_found_by_every_width(run: Run) -> None:
    model = ScriptedModel(23, lambda h: {len(h) + 5: CERTAIN})
    for width in (2, 3, 8):
        assert run("beam", model, [PROMPT], num_beams=width).completion(0) == [8, 9, 10, 11, 12]


@pytest.mark.parametrize(
    ("name", "said", "message", "argument"),
    [
        ("beam", {"num_beams": 1}, 'greedy decoding.*decoding="greedy"', "num_beams"),
        ("beam", {"num_beams": 2.0}, "an integer >= 2", "num_beams"),
        ("beam", {"num_beams": 3, "num_return_sequences": 4}, "more than num_beams=3", "num_return_sequences"),
        ("beam", {"early_stopping": "always"}, 'True, False or "never"', "early_stopping"),
        ("beam", {"length_penalty": float("nan")}, "a finite number", "length_penalty"),
        ("beam", {"length_penalty": 11}, "from -10 to 10", "length_penalty"),
        ("diverse-beam", {"num_beams": 6, "num_beam_groups": 4}, "cannot be shared out", "num_beam_groups"),
        ("diverse-beam", {"num_beam_groups": 1}, 'decoding="beam"', "num_beam_groups"),
        ("diverse-beam", {"diversity_penalty": 0.0}, "a number > 0", "diversity_penalty"),
        ("beam-sampling", {"seed": (1, 2)}, "2 seeds for 1 rows", "seed"),
    ],
)
def test_settings_that_make_no_sense_are_refused(
    name: str, said: dict[str, Any], message: str, argument: str, run: Run
) -> None:
    with pytest.raises(InputError, match=f"(?s){message}") as caught:
        run(name, ScriptedModel(23), [PROMPT], **said)
    assert caught.value.argument == argument


def test_a_field_of_another_strategy_is_refused(run: Run) -> None:
    for said in ({"temperature": 0.5}, {"num_beam_groups": 2}):
        with pytest.raises(UnsupportedRequestError, match=f"{next(iter(said))}=.* is not honoured"):
            run("beam", ScriptedModel(23), [PROMPT], **said)


def test_a_place_that_nobody_holds_cannot_fail(run: Run) -> None:
    """One token is allowed at first, so one of three beams goes on; what its neighbours hold does not matter."""

    def first_is_five(ids: Tensor, scores: Tensor) -> Tensor:
        only = torch.full_like(scores, -torch.inf).index_fill_(1, torch.tensor([5]), 0.0)
        return only if ids.shape[1] == len(PROMPT) else scores

    broken = ScriptedModel(23, lambda h: {4: float("nan")} if h[3:4] == (0,) else {})  # padding is fed to nobody
    said: dict[str, Any] = {"logits_processor": [first_is_five], "num_beams": 3, "max_new_tokens": 4}
    found = run("beam", broken, [PROMPT], **said)
    assert torch.equal(found.sequences, run("beam", ScriptedModel(23), [PROMPT], **said).sequences)
