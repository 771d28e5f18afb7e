"""Processors and warpers against the reference library, number by number."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pluglm_decoding_blocks.lengths import MinNewTokens
from pluglm_decoding_blocks.penalties import RepetitionPenalty
from pluglm_decoding_blocks.processors import Processors
from pluglm_decoding_blocks.warpers import Warpers
from torch import Tensor

from pluglm.contracts import GenerationConfig

reference = pytest.importorskip("transformers.generation.logits_process")
B, S, V = 3, 7, 41


def scores(seed: int = 0, scale: float = 4.0) -> Tensor:
    return torch.randn(B, V, generator=torch.Generator().manual_seed(seed)) * scale


def ids(seed: int = 0) -> Tensor:
    return torch.randint(0, V, (B, S), generator=torch.Generator().manual_seed(seed))


def warped(x: Tensor, **config: Any) -> Tensor:
    return Warpers([GenerationConfig(**config)], torch.device("cpu"))(x.clone())


@pytest.mark.parametrize("penalty", (0.5, 1.3, 2.0))
def test_repetition_penalty_equals_the_reference(penalty: float) -> None:
    ours, theirs = RepetitionPenalty(penalty), reference.RepetitionPenaltyLogitsProcessor(penalty)
    tokens = ids()
    for step in range(4):
        x = scores(step)
        assert torch.equal(ours(tokens, x.clone()), theirs(tokens, x.clone()))
        tokens = torch.cat((tokens, ids(step + 9)[:, :1]), dim=1)


def test_repetition_penalty_does_not_see_padding() -> None:
    tokens, x = ids(), scores()
    mask = torch.ones(B, S, dtype=torch.int64)
    mask[0, :3], mask[1, 5:] = 0, 0
    batch = RepetitionPenalty(1.7, mask)(tokens, x)
    assert torch.equal(batch[:1], RepetitionPenalty(1.7)(tokens[:1, 3:], x[:1]))
    assert torch.equal(batch[1:2], RepetitionPenalty(1.7)(tokens[1:2, :5], x[1:2]))


def test_min_new_tokens_equals_the_reference() -> None:
    eos = torch.tensor([1, 5])
    theirs = reference.MinNewTokensLengthLogitsProcessor(S - 2, 4, eos)
    for width in (S - 2, S + 1, S + 2):
        tokens = torch.zeros(B, width, dtype=torch.int64)
        assert torch.equal(MinNewTokens(S - 2, 4, eos)(tokens, scores()), theirs(tokens, scores()))


@settings(max_examples=60, deadline=None)
@given(
    temperature=st.sampled_from([None, 0.3, 1.0, 1.7]), top_k=st.sampled_from([None, 0, 1, 5, V, 99]),
    top_p=st.sampled_from([None, 0.1, 0.7, 0.95, 1.0]), min_p=st.sampled_from([None, 0.0, 0.05, 0.5, 1.0]),
    seed=st.integers(0, 50), ties=st.booleans(),
)  # fmt: skip
def test_warpers_equal_the_reference_in_its_order(
    temperature: Any, top_k: Any, top_p: Any, min_p: Any, seed: int, ties: bool
) -> None:
    x = scores(seed).round() if ties else scores(seed)
    expected = x.clone()
    if temperature is not None:
        expected = reference.TemperatureLogitsWarper(temperature)(None, expected)
    if top_k:
        expected = reference.TopKLogitsWarper(top_k)(None, expected)
    if top_p is not None and top_p < 1:
        expected = reference.TopPLogitsWarper(top_p)(None, expected)
    if min_p is not None:
        expected = reference.MinPLogitsWarper(min_p)(None, expected)
    ours = warped(x, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    assert torch.equal(ours, expected)


def test_a_twin_with_one_knob_turned_differs() -> None:
    for name, value, other in (("temperature", 0.7, 0.71), ("top_k", 9, 8), ("top_p", 0.9, 0.8), ("min_p", 0.02, 0.05)):
        assert not torch.equal(warped(scores(), **{name: value}), warped(scores(), **{name: other}))


def test_rows_with_settings_of_their_own_get_what_they_get_alone() -> None:
    configs = [
        GenerationConfig(), GenerationConfig(temperature=0.5, top_k=3), GenerationConfig(top_p=0.8, min_p=0.1),
    ]  # fmt: skip
    together = Warpers(configs, torch.device("cpu"))(scores())
    for row, config in enumerate(configs):
        alone = Warpers([config], torch.device("cpu"))(scores()[row : row + 1])
        assert torch.equal(together[row : row + 1], alone)
    assert torch.equal(together[0], scores()[0])


def test_the_callers_processors_come_after_the_built_in_ones_and_may_write_in_place() -> None:
    seen = []

    def own(input_ids: Tensor, x: Tensor) -> Tensor:
        seen.append(x.clone())
        return x.zero_()

    logits = scores()
    kept = logits.clone()
    config = GenerationConfig(repetition_penalty=2.0, min_new_tokens=3, eos_token_id=(4,))
    process = Processors(config, [own], prompt_length=S, mask=None, device=torch.device("cpu"))
    result, raw = process(ids(), logits)
    assert torch.equal(logits, kept)
    assert bool((seen[0][:, 4] == -torch.inf).all())
    assert float(result.abs().sum()) == 0
    assert raw is not None
    assert torch.equal(raw, kept.amax(-1))
