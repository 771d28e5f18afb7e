"""The tokens: those of plain decoding where they are promised, the right distribution where they are drawn anew."""

from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
import torch
from pluglm_decoding_speculative import choosing, copies_first, strategies
from pluglm_decoding_speculative.assistant import Assistant
from pluglm_decoding_speculative.copies_first import CopiesFirst
from pluglm_decoding_speculative.draft import Draft
from pluglm_decoding_speculative.strategies import Assisted, EarlyExit, Strategy
from speculating import EOS, Leaning, Remembering, V, build, call, plain, repeats, same
from torch import Tensor

from pluglm.contracts import DecodingRequest
from pluglm.errors import GenerationError
from pluglm.testing.decoding import Recorder, text
from pluglm.testing.scripted_model import CERTAIN, ScriptedModel

ROWS = ((5, 7, 9, 11, 5, 7), (6, 8), (2,), (3, 4, 5, 3, 4, 5, 3))
NAMES = ("prompt-lookup", "assisted", "early-exit")
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "longer": {"max_new_tokens": 40},
    "one token": {"max_new_tokens": 1},
    "two tokens": {"max_new_tokens": 2},
    "max_length": {"max_new_tokens": None, "max_length": 20},
    "penalty": {"repetition_penalty": 1.7, "max_new_tokens": 30},
    "end tokens": {"eos_token_id": (1, 7, 12), "max_new_tokens": 40},
    "minimum": {"eos_token_id": (1, 7, 12), "min_new_tokens": 9, "max_new_tokens": 40},
    "stop strings": {"stop_strings": ("sc", "gk", "t"), "max_new_tokens": 40},
    "stop strings after a minimum": {"stop_strings": ("sc", "gk", "t"), "min_new_tokens": 11, "max_new_tokens": 40},
    "chunks": {"prefill_chunk_size": 3},
}
SAMPLED = {
    "temperature": {"temperature": 1.3},
    "all of it": {"temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2},
}


@pytest.mark.parametrize("side", ("left", "right"))
@pytest.mark.parametrize("said", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("name", NAMES)
def test_greedy_tokens_are_those_of_plain_greedy(name: str, said: dict[str, Any], side: str) -> None:
    strategy, expected = build(name), plain(ROWS, side=side, **said)
    assert same(call(strategy, Remembering(V, repeats), ROWS, side=side, **said), expected)
    if said.get("max_new_tokens", 12) is None or said.get("max_new_tokens", 12) > 2:
        assert strategy.statistics.accepted > 5
    for row, prompt in enumerate(ROWS):
        alone = call(strategy, Remembering(V, repeats), [prompt], **said)
        assert alone.completion(0) == expected.completion(row)
        assert alone.finish_reasons[0] == expected.finish_reasons[row]


@pytest.mark.parametrize("count", (1, 2, 3, 7, 100))
@pytest.mark.parametrize("name", NAMES)
def test_the_length_of_a_guess_changes_no_token(name: str, count: int) -> None:
    own = {"prompt_lookup_num_tokens": count} if name == "prompt-lookup" else {"num_assistant_tokens": count}
    got = call(build(name), Remembering(V, repeats), ROWS, max_new_tokens=30, **own)
    assert same(got, plain(ROWS, max_new_tokens=30))


@pytest.mark.parametrize("said", SAMPLED.values(), ids=SAMPLED)
def test_prompt_lookup_draws_what_plain_sampling_draws(said: dict[str, Any]) -> None:
    strategy = build("prompt-lookup")
    for seed in (3, (1, 2, 3, 4)):
        got = call(strategy, Remembering(V, repeats), ROWS, max_new_tokens=30, seed=seed, **said)
        assert same(got, plain(ROWS, max_new_tokens=30, seed=seed, **said))
        assert strategy.statistics.accepted > 5


@pytest.mark.parametrize("said", ({}, {"temperature": 1.3, "seed": 3}))
def test_guesses_that_are_as_long_as_pays_change_no_token(said: dict[str, Any]) -> None:
    strategy = build("prompt-lookup", options=())
    assert same(
        call(strategy, Remembering(V, repeats), ROWS, max_new_tokens=40, **said), plain(ROWS, max_new_tokens=40, **said)
    )
    assert said or strategy.statistics.accepted > 5


def test_several_sequences_of_a_prompt_are_those_of_plain_sampling() -> None:
    said: dict[str, Any] = {"num_return_sequences": 3, "temperature": 1.1, "seed": 5, "max_new_tokens": 20}
    for operations in (frozenset({"rollback"}), frozenset({"rollback", "repeat"})):
        got = call(build("prompt-lookup"), Remembering(V, repeats, operations=operations), ROWS, **said)
        assert same(got, plain(ROWS, **said))
        assert len({tuple(got.completion(row)) for row in range(3)}) == 3


@pytest.mark.parametrize("said", ({}, {"num_return_sequences": 2}, {"num_assistant_tokens_schedule": "heuristic"}))
def test_a_row_that_is_drawn_with_an_assistant_does_not_depend_on_the_others(said: dict[str, Any]) -> None:
    said = {"temperature": 1.2, "top_p": 0.95, "max_new_tokens": 25, **said}
    copies = said.get("num_return_sequences", 1)
    seeds = tuple(range(40, 40 + 4 * copies))
    strategy = build("assisted")
    together = call(strategy, Remembering(V, repeats), ROWS, seed=seeds, **said)
    assert 0 < strategy.statistics.accepted < strategy.statistics.guessed
    for row, prompt in enumerate(ROWS):
        own = seeds[row * copies : (row + 1) * copies]
        alone = call(strategy, Remembering(V, repeats), [prompt], seed=own, **said)
        for copy in range(copies):
            assert alone.completion(copy) == together.completion(row * copies + copy)


def helped_by(other: ScriptedModel, size: int, name: str = "assisted") -> Strategy:
    """A strategy that guesses with another model, or with what stands for the model's own first layers."""
    request = DecodingRequest(size, "cpu", None)
    if name == "assisted":
        return Assisted(request, Assistant(other, size, None))
    strategy = EarlyExit(request, 1)
    strategy.cut = lambda model, count: other  # type: ignore[method-assign, assignment, return-value]
    return strategy


def surprise(schedule: str, threshold: float, name: str = "assisted", **own: Any) -> float:
    """Four tokens over a vocabulary of four, with an assistant of other opinions: how far the texts are from what the
    model says. Chi square in standard deviations above its mean."""
    size, n, prompt = 4, 900, (2, 3)
    model, other = Remembering(size), Leaning(size)
    strategy = helped_by(other, size, name)
    got = call(
        strategy, model, [prompt] * n, temperature=1.4, top_k=3, seed=11, max_new_tokens=4, eos_token_id=(),
        num_assistant_tokens=2, num_assistant_tokens_schedule=schedule, assistant_confidence_threshold=threshold,
        **own,
    )  # fmt: skip
    assert 0.1 < strategy.statistics.accepted / strategy.statistics.guessed < 0.9
    seen = Counter(tuple(got.completion(row)) for row in range(n))
    cells, rest = [], [n, float(n)]
    for texts in itertools.product(range(size), repeat=4):
        mean = float(n)
        for i, token in enumerate(texts):
            scores = torch.tensor(model.scores((*prompt, *texts[:i]))) / 1.4
            scores[scores < scores.topk(3).values[-1]] = -torch.inf
            mean *= float(scores.softmax(-1)[token])
        assert mean > 0 or not seen[texts]
        if mean >= 5:
            cells.append((seen[texts], mean))
            rest = [rest[0] - seen[texts], rest[1] - mean]
    if rest[1] >= 5:
        cells.append((int(rest[0]), rest[1]))
    freedom = len(cells) - 1
    assert freedom >= 20
    return (sum((count - mean) ** 2 / mean for count, mean in cells) - freedom) / (2 * freedom) ** 0.5


@pytest.mark.parametrize(
    ("name", "schedule", "threshold"),
    (("assisted", "constant", 0.0), ("assisted", "heuristic", 0.4), ("early-exit", "constant", 0.0)),
)
def test_speculative_sampling_keeps_the_models_distribution(name: str, schedule: str, threshold: float) -> None:
    assert surprise(schedule, threshold, name) < 3.3


def test_copies_beside_an_assistants_draws_keep_the_models_distribution(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    copied = CopiesFirst.propose

    def noted(self: CopiesFirst, room: Any) -> Any:
        proposals = copied(self, room)
        taken.extend(proposal.drawn_from is None for proposal in proposals.values())
        return proposals

    monkeypatch.setattr(CopiesFirst, "propose", noted)
    monkeypatch.setattr(copies_first, "LIKELY", 0.15)
    monkeypatch.setattr(strategies, "PRICES", {"cpu": 0.0})
    assert surprise("constant", 0.0, prompt_lookup_num_tokens=2) < 3.3
    assert 0.1 < sum(taken) / len(taken) < 0.9


@pytest.mark.parametrize("said", SETTINGS.values(), ids=SETTINGS)
def test_an_assistant_behind_copies_changes_no_token(said: dict[str, Any]) -> None:
    strategy = build("assisted")
    got = call(strategy, Remembering(V, repeats), ROWS, prompt_lookup_num_tokens=5, **said)
    assert same(got, plain(ROWS, **said))


def test_copies_spare_passes_of_the_assistant(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    propose = Draft.propose
    monkeypatch.setattr(Draft, "propose", lambda self, room: asked.append(len(room)) or propose(self, room))
    counts = []
    for own in ({}, {"prompt_lookup_num_tokens": 8}):
        asked.clear()
        call(build("assisted"), Remembering(V, repeats), [ROWS[0]], max_new_tokens=60, num_assistant_tokens=2, **own)
        counts.append(sum(asked))
    assert 0 < counts[1] < 0.7 * counts[0]


def test_without_the_residual_the_distribution_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """The twin: drawing from p where a guess failed must be noticed by the test above."""
    monkeypatch.setattr(choosing, "_residual", lambda p, q: p)
    assert surprise("constant", 0.0) > 6


def test_an_assistant_that_agrees_is_always_right() -> None:
    strategy = Assisted(DecodingRequest(V, "cpu", text), Assistant(Remembering(V, repeats), V, None))
    for said in ({}, {"temperature": 1.0, "seed": 2}):
        call(strategy, Remembering(V, repeats), ROWS, max_new_tokens=30, **said)
        assert strategy.statistics.accepted == strategy.statistics.guessed > 60


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("said", ({}, {"temperature": 0.9, "seed": (1, 2, 3, 4)}), ids=("greedy", "sampling"))
def test_processors_and_criteria_see_each_position_as_in_plain_decoding(name: str, said: dict[str, Any]) -> None:
    """A processor that depends on the whole text of a row and on the row's number; a criterion, too."""

    def mood(ids: Tensor, scores: Tensor) -> Tensor:
        for row in range(scores.shape[0]):
            scores[row, (int(ids[row].sum()) + 3 * row) % V] += 1.5
            scores[row, ids[row, -1]] -= 2.0
        return scores

    def tired(ids: Tensor, scores: Tensor) -> Tensor:
        assert scores.shape == (len(ROWS), V)
        return (ids[:, -4:].sum(1) % 11 == 3) & (ids.shape[1] > 12)

    if name != "prompt-lookup" and said:
        pytest.skip("draws anew: its tokens are not those of plain sampling")
    own = {"logits_processor": [mood], "stopping_criteria": [tired], "max_new_tokens": 30, **said}
    rows = [[row[i % len(row)] for i in range(6)] for row in ROWS]  # no padding: it is part of the sum
    got, expected = call(build(name), Remembering(V, repeats), rows, **own), plain(rows, **own)
    assert same(got, expected)
    assert "stop" in got.finish_reasons


@pytest.mark.parametrize("name", NAMES)
def test_a_streamer_gets_the_tokens_that_hold_in_order(name: str) -> None:
    streamer = Recorder()
    output = call(build(name), Remembering(V, repeats), ROWS, streamer=streamer, max_new_tokens=30, eos_token_id=(1, 7))
    told = torch.tensor(streamer.steps).T
    assert torch.equal(told.masked_fill(told < 0, 0), output.sequences[:, output.prompt_length :])
    assert streamer.ends == 1
    assert len(set(output.num_new_tokens)) > 1


@pytest.mark.parametrize("name", NAMES)
def test_an_end_inside_a_guess_ends_the_row_there(name: str) -> None:
    # After 4 the text says 4 4 4 …, and so does every guess; the tenth token is the end.
    def script(history: tuple[int, ...]) -> dict[int, float]:
        return {EOS if len(history) == 13 else 4: CERTAIN}

    strategy = build(name)
    if isinstance(strategy, Assisted):
        strategy.assistant = Assistant(ScriptedModel(V, script), V, None)
    if isinstance(strategy, EarlyExit):
        strategy.cut = lambda model, count: ScriptedModel(V, script)  # type: ignore[method-assign, assignment]
    output = call(strategy, ScriptedModel(V, script), [(4, 4, 4, 4)], max_new_tokens=30)
    assert output.completion(0) == [4] * 9 + [EOS]
    assert output.finish_reasons == ("eos",)
    assert strategy.statistics.passes <= 2


@pytest.mark.parametrize("name", NAMES)
def test_logprobs_are_the_models_own(name: str) -> None:
    said: dict[str, Any] = {"repetition_penalty": 1.5, "return_logprobs": True, "max_new_tokens": 20}
    got, expected = call(build(name), Remembering(V, repeats), ROWS, **said), plain(ROWS, **said)
    assert got.logprobs is not None and expected.logprobs is not None
    for row, other in zip(got.logprobs, expected.logprobs, strict=True):
        assert row == pytest.approx(other, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_scores_that_are_no_numbers_behind_a_wrong_guess_harm_nobody(name: str) -> None:
    """NaN after texts that the model does not write: only a guess leads there."""
    true = plain([ROWS[0]], max_new_tokens=20).sequences[0].tolist()

    def script(history: tuple[int, ...]) -> dict[int, float]:
        on_path = list(history) == true[: len(history)]
        return repeats(history) if on_path else dict.fromkeys(range(V), float("nan"))

    strategy = build(name)
    assert call(strategy, ScriptedModel(V, script), [ROWS[0]], max_new_tokens=14).completion(0) == true[6:20]
    assert strategy.statistics.accepted < strategy.statistics.guessed
    with pytest.raises(GenerationError, match="row 0 at new token 0 are not finite"):
        call(strategy, ScriptedModel(V, script), [(3, 3, 3)])
