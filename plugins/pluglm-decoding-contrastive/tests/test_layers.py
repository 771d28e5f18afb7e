"""Which layers DoLa contrasts, how, and what it refuses."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from pluglm_decoding_contrastive.layers import contrast, divergence, read_layers
from torch import Tensor

from pluglm.contracts import GenerationOutput, ModelDescription
from pluglm.contracts.program import DecoderProgram, Embedding, Head
from pluglm.errors import GenerationError, InputError, UnsupportedRequestError
from pluglm.testing.decoding import LONG, SHORT, never_ends
from pluglm.testing.scripted_model import LAYERS, ScriptedModel

Run = Callable[..., GenerationOutput]

V = 23


def describe(layers: int, *, tied: bool) -> ModelDescription:
    program = DecoderProgram(Embedding(V, 8), (), None, Head(tied=tied), slots=(), max_seq_len=None)
    return replace(ScriptedModel(V).description, num_layers=layers, program=program)


@pytest.mark.parametrize(
    ("layers", "tied", "low", "high"),
    [
        (32, False, range(0, 16, 2), range(16, 32, 2)),
        (32, True, range(2, 16, 2), range(16, 32, 2)),
        (40, False, range(0, 20, 2), range(20, 40, 2)),
        (61, False, range(0, 20, 2), range(41, 61, 2)),
        (61, True, range(2, 20, 2), range(41, 61, 2)),
        (3, False, [0], [1]),
        (5, True, [2], [2, 4]),
        (4, True, [2], [2]),
        (3, True, [2], [1]),
        (2, True, [1], [1]),
        (2, False, [0], [1]),
        (1, True, [0], [0]),
    ],
)
def test_low_and_high_are_every_second_layer_of_a_half(layers: int, tied: bool, low: Any, high: Any) -> None:
    description = describe(layers, tied=tied)
    assert read_layers("low", description) == tuple(low)
    assert read_layers("high", description) == tuple(high)


def test_layers_may_be_listed() -> None:
    assert read_layers([6, 2, 2], describe(8, tied=True)) == (2, 6)


@pytest.mark.parametrize("said", ["middle", [], [8], [-1], [1.0], [True], 3, None])
def test_layers_that_the_model_does_not_have_are_refused(said: Any) -> None:
    with pytest.raises(InputError, match="(?s)for a model of 8 layers.*from 0 .the embedding. to 7") as caught:
        read_layers(said, describe(8, tied=False))
    assert caught.value.argument == "dola_layers"


def test_the_divergence_is_the_textbooks() -> None:
    """Between 0 and log 2, symmetric, and the entropy of the mean less the mean of the entropies."""

    def entropy(p: list[float]) -> float:
        return -sum(x * math.log(x) for x in p if x)

    p, q = [0.7, 0.2, 0.1, 0.0], [0.1, 0.3, 0.2, 0.4]
    mean = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    found = divergence(torch.tensor(p).log(), torch.tensor(q).log())
    assert float(found) == pytest.approx(entropy(mean) - (entropy(p) + entropy(q)) / 2, abs=1e-6)
    apart = divergence(torch.tensor([1.0, 0.0]).log(), torch.tensor([0.0, 1.0]).log())
    assert float(apart) == pytest.approx(math.log(2))
    assert bool(divergence(torch.tensor([float("nan"), 0.0]), torch.tensor(q[:2]).log()).isnan())


def test_a_rows_layer_is_its_own_and_implausible_tokens_are_out() -> None:
    last = torch.tensor([[5.0, 4.0, 2.0, -9.0], [1.0, 0.0, 3.0, 2.9]])
    near, far = last + torch.tensor([0.1, 0.0, 0.0, 0.2]), last.flip(1)
    scores = contrast(last, torch.stack((torch.stack((near[0], far[0])), torch.stack((far[1], near[1])))))
    want = last.log_softmax(-1) - last.flip(1).log_softmax(-1)
    for row, plausible in enumerate(([0, 1], [2, 3, 0])):  # e^-2 is more than a tenth, e^-3 is less
        assert scores[row, plausible].tolist() == pytest.approx(want[row, plausible].tolist(), abs=1e-6)
        assert bool((scores[row, [i for i in range(4) if i not in plausible]] == -math.inf).all())


def by_hand(model: ScriptedModel, prompt: tuple[int, ...], steps: int, layers: list[int]) -> list[int]:
    """Section 2 of the paper, a token at a time, float64."""
    tokens = prompt
    for _ in range(steps):
        p = torch.tensor(model.scores(tokens), dtype=torch.float64).softmax(-1)
        inner = [torch.tensor(model.hidden_state(tokens, i), dtype=torch.float64).softmax(-1) for i in layers]
        means = [(p + q) / 2 for q in inner]
        apart = [
            float((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) for q, m in zip(inner, means, strict=True)
        ]
        ratio = (p / inner[apart.index(max(apart))]).log()
        ratio[p < 0.1 * p.max()] = -math.inf
        tokens = (*tokens, int(ratio.argmax()))
    return list(tokens[len(prompt) :])


@pytest.mark.parametrize(("said", "layers"), [("low", [0]), ("high", [2]), ([1, 2, 3], [1, 2, 3]), (None, [0])])
def test_tokens_are_those_of_the_papers_equations(said: Any, layers: list[int], run: Run) -> None:
    assert LAYERS == 4
    more = {} if said is None else {"dola_layers": said}
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    for use in ({}, {"use_cache": False}):
        rows = [LONG, (*SHORT, 0, 0)]
        output = run("dola", ScriptedModel(V), rows, attention_mask=mask, max_new_tokens=9, **use, **more)
        for row, prompt in enumerate((LONG, SHORT)):
            assert output.completion(row) == by_hand(ScriptedModel(V), prompt, 9, layers)


def test_every_token_is_run_once(run: Run) -> None:
    model = ScriptedModel(V, never_ends)
    run("dola", model, [LONG, LONG], max_new_tokens=6)
    assert model.fed == [len(LONG)] + [1] * 5


def test_processors_see_the_contrast(run: Run) -> None:
    seen: list[Tensor] = []

    def look(_: Tensor, scores: Tensor) -> Tensor:
        seen.append(scores.clone())
        return scores

    model = ScriptedModel(V)
    run("dola", model, [LONG], logits_processor=[look], max_new_tokens=1, dola_layers=[3])
    inner = torch.tensor([[model.hidden_state(LONG, 3)]])
    assert torch.equal(seen[0], contrast(torch.tensor([model.scores(LONG)]), inner))


def test_draws_have_the_distribution_of_the_contrast(run: Run) -> None:
    model, rows = ScriptedModel(V), 600
    output = run("dola", model, [LONG] * rows, temperature=0.7, seed=tuple(range(rows)), max_new_tokens=1)
    scores = contrast(torch.tensor([model.scores(LONG)]), torch.tensor([[model.hidden_state(LONG, 0)]]))[0]
    p = (scores / 0.7).softmax(-1).tolist()
    seen = Counter(output.sequences[:, -1].tolist())
    assert set(seen) <= {token for token in range(V) if p[token] > 0}
    freedom = sum(x > 0 for x in p) - 1
    statistic = sum((seen[token] - rows * p[token]) ** 2 / (rows * p[token]) for token in range(V) if p[token] > 0)
    assert freedom > 2
    assert statistic / freedom < 2.5


def test_sequences_of_one_prompt_are_drawn_and_refused_without_a_draw(run: Run) -> None:
    several = run("dola", ScriptedModel(V), [LONG], num_return_sequences=4, temperature=1.5, seed=3)
    alone = run("dola", ScriptedModel(V), [LONG], temperature=1.5, seed=3)
    assert several.completion(0) == alone.completion(0)
    assert len({tuple(several.completion(row)) for row in range(4)}) > 1
    with pytest.raises(UnsupportedRequestError, match="num_return_sequences=2: all of a prompt's .* would be the same"):
        run("dola", ScriptedModel(V), [LONG], num_return_sequences=2)


def test_logits_and_log_probabilities_are_those_of_the_last_layer_and_scores_the_contrast(run: Run) -> None:
    model = ScriptedModel(V)
    output = run(
        "dola", model, [LONG], return_logprobs=True, output_logits=True, output_scores=True, output_hidden_states=True
    )
    assert output.logprobs is not None
    assert output.logits is not None
    assert output.scores is not None
    assert output.hidden_states is not None
    history = LONG
    for step, token in enumerate(output.completion(0)):
        logits, inner = torch.tensor([model.scores(history)]), torch.tensor([[model.hidden_state(history, 0)]])
        assert output.logprobs[0][step] == pytest.approx(float(logits.log_softmax(-1)[0, token]), abs=1e-5)
        assert torch.equal(output.logits[step], logits)
        assert torch.equal(output.scores[step], contrast(logits, inner))
        assert [len(states[0]) for states in output.hidden_states[step]] == [4 if step == 0 else 1] * (LAYERS + 1)
        assert output.hidden_states[step][2][0, -1].tolist() == pytest.approx(model.hidden_state(history, 2))
        history = (*history, token)


def test_rows_that_ended_leave_holes_in_a_given_cache(run: Run) -> None:
    model = ScriptedModel(V, lambda h: {1: 1000.0 if len(h) == len(LONG) + 1 else -1000.0})
    cache, mask = model.new_cache(batch_size=2), torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    output = run(
        "dola", model, [LONG, (0, 0, *SHORT)], attention_mask=mask, past_key_values=cache, eos_token_id=1,
        max_new_tokens=9,
    )  # fmt: skip
    assert output.num_new_tokens == (2, 4)
    kept = [(*LONG, *output.completion(0)), (*SHORT, *output.completion(1)[:-1])]
    assert [cache.history(row, cache.length) for row in range(2)] == kept


def test_an_inner_layer_that_is_no_number_is_an_error(run: Run) -> None:
    class Broken(ScriptedModel):
        def logits_of(self, hidden: Tensor) -> Tensor:
            return hidden.index_fill(0, torch.tensor([1]), float("nan"))

    for layers in ([1], [1, 2]):
        with pytest.raises(GenerationError, match="not finite numbers, so no token was chosen") as caught:
            run("dola", Broken(V), [LONG, LONG], dola_layers=layers)
        assert caught.value.rows == (1,)
