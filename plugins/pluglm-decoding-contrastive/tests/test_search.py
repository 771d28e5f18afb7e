"""What contrastive search chooses, runs, refuses and leaves behind."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pluglm.contracts import OPERATIONS, GenerationOutput
from pluglm.errors import ContextLengthError, GenerationError, InputError, UnsupportedRequestError
from pluglm.testing.decoding import LONG, SHORT, never_ends
from pluglm.testing.scripted_model import ScriptedModel

Run = Callable[..., GenerationOutput]

V = 23
MASK = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
RAGGED = [LONG, (0, 0, *SHORT)]


def state(model: ScriptedModel, history: tuple[int, ...]) -> Tensor:
    """The last hidden state after these tokens."""
    found: Tensor = model(torch.tensor([history]), output_hidden_states=True).hidden_states[-1][0, -1]  # type: ignore[index]
    return found


def by_hand(model: ScriptedModel, prompt: tuple[int, ...], steps: int, alpha: float, k: int) -> list[int]:
    """The paper's equation 5 in plain numbers, every state made anew."""
    tokens = prompt
    for _ in range(steps):
        p = torch.tensor(model.scores(tokens), dtype=torch.float64).softmax(-1).tolist()
        before = [state(model, tokens[: i + 1]).double() for i in range(len(tokens))]

        def value(token: int, p: list[float] = p, before: list[Tensor] = before, tokens: Any = tokens) -> float:
            mine = state(model, (*tokens, token)).double()
            cosines = [float(mine @ other) / math.sqrt(float(mine @ mine) * float(other @ other)) for other in before]
            return (1 - alpha) * p[token] - alpha * max(cosines)

        candidates = sorted(range(V), key=lambda token: -p[token])[:k]
        tokens = (*tokens, max(candidates, key=value))
    return list(tokens[len(prompt) :])


@pytest.mark.parametrize(("alpha", "k"), [(0.6, 4), (0.2, 7), (1.0, 3), (0.05, 23)])
def test_tokens_are_those_of_the_papers_equation(alpha: float, k: int, run: Run) -> None:
    output = run("contrastive-search", ScriptedModel(V), [LONG], penalty_alpha=alpha, top_k=k, max_new_tokens=6)
    assert output.completion(0) == by_hand(ScriptedModel(V), LONG, 6, alpha, k)


def test_a_small_weight_is_greedy_and_the_defaults_are_what_the_page_says(run: Run) -> None:
    model, history = ScriptedModel(V), LONG

    def tokens(**said: Any) -> list[int]:
        return run("contrastive-search", model, [LONG], max_new_tokens=20, **said).completion(0)

    for token in tokens(penalty_alpha=1e-9):
        scores = model.scores(history)
        assert token == scores.index(max(scores))
        history = (*history, token)
    assert tokens() == tokens(penalty_alpha=0.6, top_k=4)
    assert all(tokens() != tokens(**said) for said in ({"penalty_alpha": 1e-9}, {"penalty_alpha": 0.9}, {"top_k": 2}))


def test_the_prompt_is_run_once_and_each_token_in_one_pass_for_all_candidates(run: Run) -> None:
    model = ScriptedModel(V, never_ends)
    run("contrastive-search", model, [LONG], top_k=5, max_new_tokens=7)
    assert model.fed == [len(LONG)] + [1] * 7
    assert [(cache.batch_size, cache.length) for cache in model.caches] == [(5, len(LONG) + 7)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_without_a_cache_the_tokens_are_the_same(side: str, run: Run) -> None:
    rows, mask = RAGGED, MASK
    if side == "right":
        rows, mask = [LONG, (*SHORT, 0, 0)], MASK.flip(1)
    kept = run("contrastive-search", ScriptedModel(V), rows, attention_mask=mask)
    again = run("contrastive-search", ScriptedModel(V), rows, attention_mask=mask, use_cache=False)
    assert torch.equal(kept.sequences, again.sequences)
    for row, prompt in enumerate((LONG, SHORT)):
        assert kept.completion(row) == by_hand(ScriptedModel(V), prompt, 5, 0.6, 4)


def test_a_forbidden_token_is_never_chosen_for_being_unlike_the_text(run: Run) -> None:
    def two_are_allowed(_: Tensor, scores: Tensor) -> Tensor:
        return torch.full_like(scores, -torch.inf).index_copy_(1, torch.tensor([3, 8]), scores[:, [3, 8]])

    output = run(
        "contrastive-search", ScriptedModel(V), [LONG], logits_processor=[two_are_allowed], penalty_alpha=0.99, top_k=9,
        max_new_tokens=12,
    )  # fmt: skip
    assert set(output.completion(0)) == {3, 8}


def test_processors_come_before_the_candidates(run: Run) -> None:
    """A token that a penalty makes unlikely is no candidate."""
    plain = run("contrastive-search", ScriptedModel(V), [LONG], top_k=2, penalty_alpha=0.01).completion(0)
    unlikely = dict.fromkeys(plain, -50.0)

    def away(_: Tensor, scores: Tensor) -> Tensor:
        return scores + torch.tensor([unlikely.get(token, 0.0) for token in range(V)])

    other = run("contrastive-search", ScriptedModel(V), [LONG], logits_processor=[away], top_k=2, penalty_alpha=0.01)
    assert not set(other.completion(0)) & set(plain)


def test_a_hidden_state_that_is_no_number_is_an_error(run: Run) -> None:
    class Broken(ScriptedModel):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            output = super().__call__(*args, **kwargs)
            if output.hidden_states is not None and args == () and kwargs["input_ids"].shape == (8, 1):
                output.hidden_states[-1][5] = float("nan")
            return output

    with pytest.raises(GenerationError, match="not finite numbers, so no token was chosen") as caught:
        run("contrastive-search", Broken(V), [LONG, LONG])
    assert caught.value.rows == (1,)


@pytest.mark.parametrize("cached", [True, False])
def test_what_a_call_asks_to_see_belongs_to_the_chosen_tokens(cached: bool, run: Run) -> None:
    model = ScriptedModel(V)
    output = run(
        "contrastive-search", model, [LONG, LONG[::-1]], use_cache=cached, output_logits=True, output_scores=True,
        output_hidden_states=True, return_logprobs=True, max_new_tokens=4,
    )  # fmt: skip
    assert output.logits is not None
    assert output.scores is not None
    assert output.hidden_states is not None
    assert output.logprobs is not None
    for row in range(2):
        for step in range(4):
            text = tuple(output.sequences[row, : len(LONG) + step].tolist())
            assert output.logits[step][row].tolist() == pytest.approx(model.scores(text))
            assert output.scores[step][row].tolist() == pytest.approx(model.scores(text))
            for layer, states in enumerate(output.hidden_states[step]):
                assert states.shape == (2, len(LONG) if step == 0 else 1, V)
                assert states[row, -1].tolist() == pytest.approx(model.hidden_state(text, layer))
            token = int(output.sequences[row, len(LONG) + step])
            said = float(torch.tensor(model.scores(text)).log_softmax(-1)[token])
            assert output.logprobs[row][step] == pytest.approx(said, abs=1e-5)


def test_a_given_cache_of_several_rows_is_left_with_one_row_a_text_and_holes_behind_its_end(run: Run) -> None:
    model = ScriptedModel(V, lambda h: {1: 1000.0 if len(h) == len(LONG) + 1 else -1000.0})
    cache = model.new_cache(batch_size=2)
    output = run(
        "contrastive-search", model, RAGGED, attention_mask=MASK, past_key_values=cache, eos_token_id=1,
        max_new_tokens=9, top_k=3,
    )  # fmt: skip
    assert output.num_new_tokens == (2, 4)
    kept = [(*LONG, *output.completion(0)), (*SHORT, *output.completion(1)[:-1])]
    assert (cache.batch_size, cache.length) == (2, output.sequences.shape[1] - 1)
    assert [cache.history(row, cache.length) for row in range(2)] == kept


def test_a_text_that_a_given_cache_holds_counts_as_it_does_without(run: Run) -> None:
    model = ScriptedModel(V)
    cache = model.new_cache(batch_size=2)
    model(torch.tensor(RAGGED)[:, :3], attention_mask=MASK[:, :3], past_key_values=cache, use_cache=True)
    goes_on = run("contrastive-search", model, RAGGED, attention_mask=MASK, past_key_values=cache)
    assert torch.equal(goes_on.sequences, run("contrastive-search", model, RAGGED, attention_mask=MASK).sequences)


def test_after_a_failure_a_given_cache_holds_the_prompt(run: Run) -> None:
    def fails(ids: Tensor, scores: Tensor) -> Tensor:
        return scores / (ids.shape[1] < len(LONG) + 2)

    model = ScriptedModel(V)
    cache = model.new_cache(batch_size=1)
    with pytest.raises(GenerationError):
        run("contrastive-search", model, [LONG], past_key_values=cache, logits_processor=[fails])
    assert cache.batch_size == 1
    assert cache.history(0, cache.length) == LONG


@pytest.mark.parametrize(
    ("said", "message", "argument"),
    [
        ({"penalty_alpha": 0.0}, 'a number > 0, at most 1.*decoding="greedy"', "penalty_alpha"),
        ({"penalty_alpha": 1.1}, "penalty_alpha=1.1 makes no sense", "penalty_alpha"),
        ({"penalty_alpha": True}, "penalty_alpha=True makes no sense", "penalty_alpha"),
        ({"top_k": 1}, 'top_k=1 leaves nothing to choose from.*decoding="greedy"', "top_k"),
        ({"top_k": 0}, "top_k=0 leaves nothing", "top_k"),
    ],
)
def test_settings_that_make_no_sense_are_refused(said: dict[str, Any], message: str, argument: str, run: Run) -> None:
    with pytest.raises(InputError, match=f"(?s){message}") as caught:
        run("contrastive-search", ScriptedModel(V), [LONG], **said)
    assert caught.value.argument == argument


def test_several_sequences_of_a_prompt_are_refused(run: Run) -> None:
    with pytest.raises(UnsupportedRequestError, match="num_return_sequences=2: all of a prompt's .* would be the same"):
        run("contrastive-search", ScriptedModel(V), [LONG], num_return_sequences=2)


def test_caches_that_cannot_do_it_are_refused(run: Run) -> None:
    def search(*operations: str, given: bool, capacity: int | None = None) -> None:
        model = ScriptedModel(V, operations=frozenset(operations))
        cache = {"past_key_values": model.new_cache(batch_size=1, capacity=capacity)} if given else {}
        run("contrastive-search", model, [LONG], **cache)

    with pytest.raises(UnsupportedRequestError, match="cannot use a scripted cache: it lacks reorder"):
        search("repeat", given=False)
    with pytest.raises(InputError, match=r"(?s)for contrastive search.*\(scripted\) has no crop, rollback"):
        search("repeat", "reorder", "select", given=True)
    with pytest.raises(ContextLengthError, match="holds 8 cells a row; prompt and new tokens need 9"):
        search(*OPERATIONS, given=True, capacity=8)
    search(*OPERATIONS, given=True, capacity=9)
