"""Required phrases: in every text, by the best of all texts that hold them, and refused where they cannot occur."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from pluglm_decoding_beam.phrases import DisjunctiveConstraint, PhrasalConstraint
from pluglm_decoding_beam.tracker import START, Tracker
from torch import Tensor

from pluglm.contracts import GenerationOutput
from pluglm.errors import GenerationError, InputError, UnsupportedRequestError
from pluglm.testing.scripted_model import CERTAIN, ScriptedModel

Run = Callable[..., GenerationOutput]
Constraints = Sequence[Sequence[Sequence[int]]]

V, EOS, PROMPT = 5, 1, (2, 4, 3)


def holds(text: Sequence[int], phrase: Sequence[int]) -> bool:
    return any(tuple(text[i : i + len(phrase)]) == tuple(phrase) for i in range(len(text)))


def holds_all(text: Sequence[int], constraints: Constraints) -> bool:
    return all(any(holds(text, phrase) for phrase in alternatives) for alternatives in constraints)


def likelihood(model: ScriptedModel, prompt: Sequence[int], text: Sequence[int]) -> float:
    history = tuple(prompt)
    total = 0.0
    for token in text:
        total += torch.tensor(model.scores(history)).log_softmax(-1)[token].item()
        history += (token,)
    return total


#: One, with a token twice; two that share their beginning, one inside another, an end that begins the other; choices.
CASES: list[Constraints] = [
    [[(2, 2, 3)]],
    [[(2, 3)], [(2, 4)]],
    [[(3,)], [(2, 3)]],
    [[(2, 3)], [(3, 4)]],
    [[(4, 2)], [(2, 4)]],
    [[(0, 3, 0, 0)]],
    [[(2, 3), (4,)], [(3, 2), (0, 0)]],
    [[(0,)], [(2,)], [(3,)]],
]


@pytest.mark.parametrize("constraints", CASES, ids=str)
@pytest.mark.parametrize("penalty", [0.0, 1.5])
def test_a_search_wide_enough_finds_the_best_texts_that_hold_the_phrases(
    constraints: Constraints, penalty: float, run: Run
) -> None:
    model, longest = ScriptedModel(V), 4
    texts = [
        (*head, last)
        for length in range(1, longest + 1)
        for head in itertools.product([token for token in range(V) if token != EOS], repeat=length - 1)
        for last in (range(V) if length == longest else (EOS,))
    ]
    ranked = sorted(
        ((likelihood(model, PROMPT, t) / len(t) ** penalty, t) for t in texts if holds_all(t, constraints)),
        reverse=True,
    )
    wanted = min(4, len(ranked))
    output = run(
        "constrained-beam", model, [PROMPT], num_beams=300, num_return_sequences=wanted, max_new_tokens=longest,
        eos_token_id=EOS, length_penalty=penalty, early_stopping="never", force_words_ids=constraints,
    )  # fmt: skip
    assert [tuple(output.completion(i)) for i in range(wanted)] == [t for _, t in ranked[:wanted]]
    assert output.sequence_scores == pytest.approx([score for score, _ in ranked[:wanted]], abs=1e-5)


@pytest.mark.parametrize("constraints", CASES, ids=str)
def test_the_fewest_tokens_are_known_exactly(constraints: Constraints) -> None:
    """Against all texts, for every text that one may have begun with."""
    tracker = Tracker([tuple(map(tuple, alternatives)) for alternatives in constraints])
    texts = [text for length in range(6) for text in itertools.product((0, 2, 3, 4), repeat=length)]
    shortest = {}
    for text in texts:  # shortest first
        if holds_all(text, constraints):
            for length in range(len(text) + 1):
                shortest.setdefault(text[:length], len(text) - length)
    assert len(shortest) > 20
    for text, need in shortest.items():
        state = START
        for token in text:
            state = tracker.step(state, token)
        assert tracker.need(state) == need, text


@pytest.mark.parametrize("beams", [2, 3, 5])
@pytest.mark.parametrize("constraints", CASES, ids=str)
def test_every_text_holds_every_phrase_even_if_they_just_fit_in(constraints: Constraints, beams: int, run: Run) -> None:
    model = ScriptedModel(11, lambda _: {EOS: 2.9})  # which would rather end at once
    shortest = Tracker([tuple(map(tuple, alternatives)) for alternatives in constraints]).need(START)
    fitting = sum(holds_all(text, constraints) for text in itertools.product((0, 2, 3, 4), repeat=shortest))
    for room in (shortest, shortest + 1, shortest + 3, 14):
        # No place is wasted on a text that cannot be completed any more.
        copies = min(beams, fitting if room == shortest else beams)
        output = run(
            "constrained-beam", model, [PROMPT, (7, 8, 9)], num_beams=beams, max_new_tokens=room, eos_token_id=EOS,
            force_words_ids=constraints, num_return_sequences=copies,
        )  # fmt: skip
        for row in range(2 * copies):
            text = output.completion(row)
            assert holds_all(text, constraints)
            assert EOS not in text[:-1]
            assert output.finish_reasons[row] == ("eos" if text[-1] == EOS else "length")


def test_ends_are_forbidden_until_the_phrases_are_there(run: Run) -> None:
    output = run("constrained-beam", ScriptedModel(11, lambda _: {EOS: 2.9}), [PROMPT], num_beams=3, max_new_tokens=9,
                 eos_token_id=EOS, force_words_ids=[[5, 6]], output_scores=True)  # fmt: skip
    assert output.scores is not None
    assert output.beam_indices is not None
    open_ = [bool(output.scores[t][row, EOS] == -torch.inf) for t, row in enumerate(output.beam_indices[0])]
    at = next(i for i in range(9) if holds(output.completion(0)[:i], (5, 6)))
    assert open_ == [t < at for t in range(len(open_))]


def test_without_phrases_it_is_a_beam_search(run: Run) -> None:
    said: dict[str, Any] = {
        "num_beams": 4, "num_return_sequences": 4, "eos_token_id": (1, 2), "max_new_tokens": 9, "return_logprobs": True,
    }  # fmt: skip
    prompts = [PROMPT, (7, 8, 9)]
    plain, free = (run(name, ScriptedModel(23), prompts, **said) for name in ("beam", "constrained-beam"))
    assert torch.equal(plain.sequences, free.sequences)
    assert (plain.sequence_scores, plain.beam_indices) == (free.sequence_scores, free.beam_indices)
    assert plain.logprobs == free.logprobs


def test_a_phrase_that_comes_by_itself_changes_nothing(run: Run) -> None:
    model = ScriptedModel(23, lambda h: {(len(h) + 5) % 23: CERTAIN} if len(h) < 9 else {EOS: CERTAIN})
    said: dict[str, Any] = {"num_beams": 4, "eos_token_id": EOS, "max_new_tokens": 9}
    plain = run("beam", model, [PROMPT], **said)
    asked = run("constrained-beam", model, [PROMPT], force_words_ids=[[10, 11]], **said)
    assert plain.completion(0) == asked.completion(0) == [8, 9, 10, 11, 12, 13, EOS]
    assert plain.sequence_scores == asked.sequence_scores


@pytest.mark.parametrize("side", ["left", "right"])
def test_rows_of_a_ragged_batch_are_found_as_alone(side: str, run: Run) -> None:
    said: dict[str, Any] = {
        "num_beams": 4, "num_return_sequences": 2, "eos_token_id": (EOS, 2), "max_new_tokens": 12,
        "force_words_ids": [[5, 5, 6], [[7, 8], [9]], [5, 10]],
    }  # fmt: skip
    rows = [(2, 4, 3, 6), (8,), (7, 3)]
    ids, mask = [], []
    for row in rows:
        fill = [0] * (4 - len(row))
        ids.append([*fill, *row] if side == "left" else [*row, *fill])
        mask.append([*fill, *[1] * len(row)] if side == "left" else [*[1] * len(row), *fill])
    batch = run("constrained-beam", ScriptedModel(23), ids, attention_mask=torch.tensor(mask), **said)
    for number, row in enumerate(rows):
        alone = run("constrained-beam", ScriptedModel(23), [row], **said)
        assert [batch.completion(2 * number + i) for i in range(2)] == [alone.completion(i) for i in range(2)]
        assert batch.sequence_scores is not None
        assert batch.sequence_scores[2 * number : 2 * number + 2] == alone.sequence_scores


def test_objects_and_lists_ask_for_the_same(run: Run) -> None:
    said: dict[str, Any] = {"num_beams": 3, "eos_token_id": EOS, "max_new_tokens": 9}
    lists = run("constrained-beam", ScriptedModel(23), [PROMPT], force_words_ids=[[5, 6], [[7], [8, 9]]], **said)
    objects = run(
        "constrained-beam", ScriptedModel(23), [PROMPT], **said,
        constraints=[PhrasalConstraint([5, 6]), DisjunctiveConstraint([[7], [8, 9]])],
    )  # fmt: skip
    both = run("constrained-beam", ScriptedModel(23), [PROMPT], **said, force_words_ids=[[5, 6]],
               constraints=[DisjunctiveConstraint([[7], [8, 9]])])  # fmt: skip
    assert torch.equal(lists.sequences, objects.sequences)
    assert torch.equal(lists.sequences, both.sequences)
    assert not torch.equal(lists.sequences, run("beam", ScriptedModel(23), [PROMPT], **said).sequences)


def test_many_phrases_that_share_nothing_are_no_burden(run: Run) -> None:
    words = [[2 * i, 2 * i + 1] for i in range(1, 40)]
    output = run(
        "constrained-beam", ScriptedModel(100), [PROMPT], num_beams=4, max_new_tokens=78, force_words_ids=words
    )
    assert all(holds(output.completion(0), word) for word in words)


def test_phrases_that_no_limit_leaves_room_for_are_refused(run: Run) -> None:
    said: dict[str, Any] = {"max_length": 8, "max_new_tokens": None, "force_words_ids": [[5, 6, 7, 8, 9, 6], [6, 5]]}
    with pytest.raises(InputError, match="cannot all occur in row 1: they take 7 tokens at least, and at most 5") as e:
        run("constrained-beam", ScriptedModel(23), [(0, *PROMPT[1:]), PROMPT], **said,
            attention_mask=torch.tensor([[0, 1, 1], [1, 1, 1]]))  # fmt: skip
    assert (e.value.argument, "fewer phrases" in str(e.value)) == ("max_new_tokens", True)


def test_processors_that_forbid_a_phrase_are_an_error(run: Run) -> None:
    with pytest.raises(GenerationError, match="no hypothesis of row 0 can hold all phrases: none is left") as caught:
        run("constrained-beam", ScriptedModel(23), [PROMPT], force_words_ids=[[5, 6]], suppress_tokens=[6])
    assert caught.value.rows == (0,)
    assert "processors forbid" in str(caught.value)


def test_a_criterion_that_ends_texts_too_early_is_an_error(run: Run) -> None:
    def at_once(ids: Tensor, _: Tensor | None) -> Tensor:
        return torch.ones(ids.shape[0], dtype=torch.bool)

    said: dict[str, Any] = {"force_words_ids": [[5, 6]], "num_beams": 2}
    with pytest.raises(GenerationError, match="can hold all phrases: none is left at new token 1"):
        run("constrained-beam", ScriptedModel(23), [PROMPT], stopping_criteria=[at_once], **said)
    last = run("constrained-beam", ScriptedModel(23), [PROMPT], **said, stop_strings=("fg", "a"))
    assert (last.completion(0)[-2:], last.finish_reasons) == ([5, 6], ("stop",))


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"force_words_ids": []}, "a list with one entry at least"),
        ({"force_words_ids": [[]]}, "token ids, one at least"),
        ({"force_words_ids": [[5, -1]]}, "none below 0"),
        ({"force_words_ids": [5, 6]}, "token ids, one at least"),
        ({"force_words_ids": [[[5], [True]]]}, "token ids, one at least"),
        ({"force_words_ids": [[5, 23]]}, r"phrase \[5, 23\], and token 23 is outside the vocabulary of 23"),
        ({"force_words_ids": [[5, EOS]]}, "token 1 is an end token"),
        ({"force_words_ids": [[[5, 6], [5, 6, 7]]]}, r"offers \[5, 6\] and \[5, 6, 7\] for one constraint"),
        ({"force_words_ids": [[[5, 6], [5, 6]]]}, r"offers \[5, 6\] and \[5, 6\] for one constraint"),
        ({"force_words_ids": [[5, 6], [7], [[5, 6]]]}, r"asks for \[5, 6\] twice"),
        ({"force_words_ids": [[i, i + 1] for i in range(2, 16)]}, "14 phrases share tokens with other phrases; 12 can"),
        ({"constraints": [[5, 6]]}, "a list of PhrasalConstraint and DisjunctiveConstraint"),
        ({"constraints": PhrasalConstraint([5])}, "a list with one entry at least"),
    ],
)
def test_what_is_no_phrase_is_refused(said: dict[str, Any], message: str, run: Run) -> None:
    with pytest.raises(InputError, match=message) as caught:
        run("constrained-beam", ScriptedModel(23), [PROMPT], eos_token_id=EOS, max_new_tokens=20, **said)
    assert caught.value.argument == next(iter(said))


def test_objects_are_checked_when_they_are_made() -> None:
    with pytest.raises(InputError, match="token ids, one at least"):
        PhrasalConstraint([])
    with pytest.raises(InputError, match="the first begins the second"):
        DisjunctiveConstraint([[4, 5], [4]])
    with pytest.raises(InputError, match="a list of phrases"):
        DisjunctiveConstraint([])


def test_the_other_searches_refuse_phrases(run: Run) -> None:
    for name in ("beam", "beam-sampling", "diverse-beam"):
        with pytest.raises(UnsupportedRequestError, match=r"force_words_ids=\[\[5\]\] is not honoured"):
            run(name, ScriptedModel(23), [PROMPT], force_words_ids=[[5]])
