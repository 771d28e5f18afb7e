"""The caller's processors stand where they say; a watermark comes from any object that makes one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pluglm_decoding_blocks.processors import Processors
from pluglm_decoding_blocks.warpers import Warpers
from torch import Tensor

from pluglm.contracts import STAGES, GenerationConfig, LogitsProcessor, Placed
from pluglm.errors import InputError

V, CPU = 11, torch.device("cpu")


def chain(own: list[LogitsProcessor], **said: Any) -> Processors:
    config = GenerationConfig(max_new_tokens=4, eos_token_id=(1,)).updated(**said)
    warpers = Warpers([config], CPU)
    return Processors(config, own, prompt_length=3, mask=None, device=CPU, warpers=warpers)


def run(process: Processors) -> Tensor:
    return process(torch.tensor([[4, 5, 6], [7, 8, 9]]), torch.arange(2.0 * V).view(2, V))[0]


def noting(seen: list[Any], what: Any) -> LogitsProcessor:
    def process(_: Tensor, scores: Tensor) -> Tensor:
        seen.append(what)
        return scores

    return process


def test_every_stage_is_a_place_and_the_places_are_in_order() -> None:
    seen: list[Any] = []
    own = [Placed(noting(seen, (stage, side)), **{side: stage}) for stage in STAGES for side in ("after", "before")]
    run(chain([*own[::-1], noting(seen, ("user", "itself"))]))
    expected = [(stage, side) for stage in STAGES for side in ("before", "after")]
    at = expected.index(("user", "after"))
    assert seen == [*expected[:at], ("user", "itself"), *expected[at:]]


def test_several_at_one_place_stand_in_the_callers_order() -> None:
    seen: list[Any] = []
    run(chain([Placed(noting(seen, i), after="top_k") for i in range(3)]))
    assert seen == [0, 1, 2]


@pytest.mark.parametrize(
    ("place", "best"),
    [
        ({"before": "temperature"}, 20.0),
        ({"after": "temperature"}, 40.0),
        ({"before": "top_k"}, 40.0),
        ({"before": "repetition_penalty"}, 21.0),
        ({"after": "bad_words"}, 20.0),
    ],
)
def test_a_placed_processor_sees_what_its_place_makes_of_the_scores(place: dict[str, str], best: float) -> None:
    seen: list[float] = []

    def own(_: Tensor, scores: Tensor) -> Tensor:
        seen.append(float(scores[1].max()))
        return scores

    run(chain([Placed(own, **place)], sequence_bias={(10,): 0.0}, temperature=0.5, top_k=3, bad_words_ids=[[10]]))
    assert seen == [best]


def test_a_place_among_filters_changes_what_they_keep() -> None:
    def prefer_three(_: Tensor, scores: Tensor) -> Tensor:
        return scores.index_fill(1, torch.tensor([3]), 100.0)

    kept = {
        where: sorted((run(chain([Placed(prefer_three, **{where: "top_k"})], top_k=2))[0] > -torch.inf).nonzero()[:, 0])
        for where in ("before", "after")
    }
    assert [int(i) for i in kept["before"]] == [3, 10]
    assert [int(i) for i in kept["after"]] == [3, 9, 10]


def test_after_renormalize_scores_are_log_probabilities() -> None:
    seen: list[Tensor] = []

    def own(_: Tensor, scores: Tensor) -> Tensor:
        seen.append(scores.clone())
        return scores

    run(chain([Placed(own, after="renormalize")], renormalize_logits=True))
    assert seen[0].exp().sum(-1) == pytest.approx(torch.ones(2))


@pytest.mark.parametrize("place", [{}, {"before": "user", "after": "user"}, {"before": "top-k"}, {"after": ""}])
def test_no_place_is_refused_with_the_stages(place: dict[str, str]) -> None:
    with pytest.raises(InputError, match="names no place") as caught:
        Placed(lambda ids, scores: scores, **place)
    assert "repetition_penalty, no_repeat_ngram" in caught.value.fix


class Green:
    """A watermark: it favours the tokens of the last one's parity."""

    def __init__(self) -> None:
        self.made: list[tuple[int, Any]] = []

    def construct_processor(self, vocab_size: int, device: Any) -> Callable[[Tensor, Tensor], Tensor]:
        self.made.append((vocab_size, device))
        parity = torch.arange(vocab_size, device=device) % 2
        return lambda ids, scores: scores + 2.0 * (parity == ids[:, -1:] % 2)


def test_a_watermark_is_made_once_and_comes_after_the_filters() -> None:
    config, seen = Green(), []

    def own(_: Tensor, scores: Tensor) -> Tensor:
        seen.append(scores.clone())
        return scores

    process = chain([Placed(own, before="watermark")], watermarking_config=config, top_k=4, temperature=2.0)
    after = run(process)
    run(process)
    assert config.made == [(V, CPU)]
    favoured = torch.arange(V) % 2 == torch.tensor([[0], [1]])
    torch.testing.assert_close(after, torch.where(favoured, seen[0] + 2, seen[0]))
    assert int((seen[0] > -torch.inf).sum()) == 8


def test_a_watermark_sees_texts_without_padding_between_prompt_and_new_tokens() -> None:
    config = GenerationConfig(max_new_tokens=4, extra={"watermarking_config": Green()})
    ids, mask = torch.tensor([[4, 5, 0], [7, 8, 9]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    process = Processors(config, None, prompt_length=3, mask=mask, device=CPU)
    assert process(ids, torch.zeros(2, V))[0][:, 1].tolist() == [2.0, 2.0]
