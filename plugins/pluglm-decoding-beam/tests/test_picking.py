"""Drawn candidates have the distribution that is promised, groups keep apart."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

import pytest
import torch
from pluglm_decoding_beam.picking import Drawn

from pluglm.contracts import GenerationOutput
from pluglm.testing.scripted_model import ScriptedModel

Run = Callable[..., GenerationOutput]

PROMPT = (2, 4, 3)


def chi_square(seen: Counter[tuple[int, ...]], expected: dict[tuple[int, ...], float]) -> float:
    """Pearson's statistic over its degrees of freedom; about 1 for the right distribution."""
    total = seen.total()
    assert set(seen) <= set(expected)
    found = sum((seen[key] - total * p) ** 2 / (total * p) for key, p in expected.items())
    return found / (len(expected) - 1)


def test_candidates_are_drawn_without_replacement_in_the_order_of_the_draws() -> None:
    p = [0.45, 0.3, 0.15, 0.1]
    totals = torch.tensor([p]).log().expand(4000, 4) + 3.0  # totals need not be normalised
    values, places = Drawn(torch.arange(4000))(totals.contiguous(), 2, 3)
    assert torch.equal(values, totals.gather(1, places))
    expected = {
        (i, j, k): p[i] * p[j] / (1 - p[i]) * p[k] / (1 - p[i] - p[j])
        for i in range(4) for j in range(4) for k in range(4) if len({i, j, k}) == 3
    }  # fmt: skip
    seen = Counter(tuple(row) for row in places.tolist())
    assert chi_square(seen, expected) < 1.7
    swapped = {(j, i, k): q for (i, j, k), q in expected.items()}
    assert chi_square(seen, swapped) > 10


def test_what_is_forbidden_is_drawn_last_and_marked() -> None:
    totals = torch.tensor([[-torch.inf, 0.0, -torch.inf, -30.0]])
    values, places = Drawn(torch.tensor([5]))(totals, 0, 4)
    assert sorted(places[0, :2].tolist()) == [1, 3]
    assert values[0, 2:].tolist() == [-math.inf, -math.inf]


def test_the_sequence_of_a_sampled_search_is_the_better_of_two_draws(run: Run) -> None:
    """Of two beams and one token: the better of the first two of the four candidates that are drawn."""
    model, rows = ScriptedModel(7), 3000
    p = torch.tensor(model.scores(PROMPT)).div(1.6).softmax(-1).tolist()
    expected = dict.fromkeys([(token,) for token in range(7)], 0.0)
    for i in range(7):
        for j in range(7):
            if i != j:
                expected[(i if p[i] > p[j] else j,)] += p[i] * p[j] / (1 - p[i])
    expected = {key: q for key, q in expected.items() if q > 0}  # the least likely token never wins
    output = run(
        "beam-sampling", model, [PROMPT] * rows, num_beams=2, max_new_tokens=1, temperature=1.6,
        seed=tuple(range(rows)),
    )  # fmt: skip
    seen = Counter(tuple(output.completion(row)) for row in range(rows))
    assert chi_square(seen, expected) < 2.5
    assert chi_square(seen, {(token,): p[token] for token in range(7)}) > 10


def test_other_seeds_find_other_texts_and_the_same_seed_the_same(run: Run) -> None:
    def found(seed: int) -> tuple[int, ...]:
        return tuple(run("beam-sampling", ScriptedModel(23), [PROMPT], seed=seed, num_beams=3).completion(0))

    assert len({found(seed) for seed in range(12)}) > 6
    assert found(3) == found(3)


def diverse(
    model: ScriptedModel, groups: int, width: int, penalty: float, steps: int, eos: int
) -> list[tuple[int, ...]]:
    """Algorithm 1 of the paper in plain lists, best first, for searches that only `steps` end."""
    beams: list[list[tuple[float, tuple[int, ...]]]] = [[(0.0, ())] for _ in range(groups)]
    ended: list[tuple[float, tuple[int, ...]]] = []
    for step in range(steps):
        taken: Counter[int] = Counter()
        for group in range(groups):
            options = []
            for score, tokens in beams[group]:
                logprobs = torch.tensor(model.scores(PROMPT + tokens)).log_softmax(-1).tolist()
                options += [
                    (score + logprob - penalty * taken[token], (*tokens, token))
                    for token, logprob in enumerate(logprobs)
                ]
            options = [option for option in sorted(options, reverse=True) if option[1][-1] != eos]
            beams[group] = options[:width]
            taken.update(tokens[-1] for _, tokens in beams[group])
            if step + 1 == steps:
                ended += beams[group]
    return [tokens for _, tokens in sorted(ended, key=lambda one: -one[0])]


@pytest.mark.parametrize(("groups", "width"), [(2, 2), (3, 1), (4, 3)])
@pytest.mark.parametrize("penalty", [0.3, 2.0])
def test_groups_keep_apart_as_in_the_papers_algorithm(groups: int, width: int, penalty: float, run: Run) -> None:
    model = ScriptedModel(23, lambda _: {1: -50.0})
    beams = groups * width
    output = run(
        "diverse-beam", model, [PROMPT], num_beams=beams, num_beam_groups=groups, diversity_penalty=penalty,
        num_return_sequences=beams, eos_token_id=1, max_new_tokens=4,
    )  # fmt: skip
    assert [tuple(output.completion(i)) for i in range(beams)] == diverse(model, groups, width, penalty, 4, 1)


def test_with_next_to_no_penalty_every_group_is_a_beam_search(run: Run) -> None:
    said = {"eos_token_id": (1, 2, 3), "max_new_tokens": 6, "early_stopping": "never"}
    alone = run("beam", ScriptedModel(23), [PROMPT], num_beams=3, num_return_sequences=3, **said)
    groups = run("diverse-beam", ScriptedModel(23), [PROMPT], num_beams=6, num_beam_groups=2, diversity_penalty=1e-9,
                 num_return_sequences=6, **said)  # fmt: skip
    assert [groups.completion(i) for i in (0, 2, 4)] == [alone.completion(i) for i in range(3)]
    assert [groups.completion(i) for i in (1, 3, 5)] == [alone.completion(i) for i in range(3)]


def test_a_penalty_makes_the_texts_differ_more(run: Run) -> None:
    def first_tokens(penalty: float) -> int:
        output = run("diverse-beam", ScriptedModel(23), [PROMPT], num_beams=4, diversity_penalty=penalty,
                     num_return_sequences=4)  # fmt: skip
        return len({output.completion(i)[0] for i in range(4)})

    assert first_tokens(1e-6) == 1
    assert first_tokens(100.0) == 4
