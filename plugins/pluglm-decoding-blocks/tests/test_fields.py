"""Values that make no sense are refused when a call begins, each with its name and what it must be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pluglm_decoding_blocks import criteria
from pluglm_decoding_blocks.criteria import MaxTime, call_criteria
from pluglm_decoding_blocks.fields import read_fields
from pluglm_decoding_blocks.settings import (
    COMMON_FIELDS,
    GUIDANCE_FIELDS,
    OUTPUT_FIELDS,
    PROCESSOR_FIELDS,
    SAMPLING_FIELDS,
    WATERMARK_FIELDS,
    read_settings,
)
from pluglm_decoding_blocks.warpers import Warpers

from pluglm.contracts import GenerationConfig
from pluglm.errors import InputError
from pluglm.generation import EXTRA_SAMPLING, SAMPLING

V = 11
IDS, WORDS = "the id of a token, or a list of ids", "a list of lists of token ids, none of them empty"
BIASES = r"\{\(ids of a sequence\): number\}, or"


def read(**said: Any) -> None:
    config = GenerationConfig(max_new_tokens=4, eos_token_id=(1,)).updated(**said)
    fields = COMMON_FIELDS | OUTPUT_FIELDS | WATERMARK_FIELDS
    read_settings(config, "mine", fields, vocab_size=V, decode=None)


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("sequence_bias", {}, BIASES),
        ("sequence_bias", [[[1, 2]]], BIASES),
        ("sequence_bias", {(1, -2): 1.0}, BIASES),
        ("sequence_bias", {(): 1.0}, BIASES),
        ("sequence_bias", {(1,): "much"}, BIASES),
        ("sequence_bias", {(1,): float("nan")}, BIASES),
        ("sequence_bias", {"one": 1.0}, BIASES),
        ("encoder_repetition_penalty", 0, "a number > 0"),
        ("no_repeat_ngram_size", -1, "an integer >= 0"),
        ("encoder_no_repeat_ngram_size", 2.0, "an integer >= 0"),
        ("bad_words_ids", [], WORDS),
        ("bad_words_ids", [3], WORDS),
        ("bad_words_ids", [[3], []], WORDS),
        ("min_length", True, "an integer >= 0"),
        ("prefix_allowed_tokens_fn", [1], r"a function \(prompt number, ids\) -> ids"),
        ("forced_bos_token_id", [1, 2], "the id of one token"),
        ("forced_eos_token_id", -1, IDS),
        ("remove_invalid_values", 1, "True or False"),
        ("renormalize_logits", "yes", "True or False"),
        ("exponential_decay_length_penalty", 1.5, r"\(new tokens before it begins, a factor > 0\)"),
        ("exponential_decay_length_penalty", (2, 0), r"\(new tokens before it begins, a factor > 0\)"),
        ("suppress_tokens", "all", IDS),
        ("begin_suppress_tokens", [1.5], IDS),
        ("watermarking_config", {"bias": 2.0}, r"an object with construct_processor\(vocab_size, device\)"),
        ("output_scores", 1, "True or False"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_with_its_rule(name: str, value: Any, rule: str) -> None:
    with pytest.raises(InputError, match=rf"{name}=.* makes no sense: it must be {rule}") as caught:
        read(**{name: value})
    assert caught.value.argument == name
    assert caught.value.fix == f"Pass such a value, or leave {name} out."


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("top_h", 0, "a number > 0 and <= 1"),
        ("typical_p", 1.5, "a number > 0 and <= 1"),
        ("epsilon_cutoff", 1, "a number >= 0 and < 1"),
        ("eta_cutoff", -0.1, "a number >= 0 and < 1"),
        ("eta_cutoff", "little", "a number >= 0 and < 1"),
    ],
)
def test_a_filter_that_makes_no_sense_is_refused_with_its_rule(name: str, value: Any, rule: str) -> None:
    with pytest.raises(InputError, match=rf"{name}=.* makes no sense: it must be {rule}"):
        Warpers([GenerationConfig().updated(**{name: value})], torch.device("cpu"))


def test_a_top_k_beyond_every_vocabulary_keeps_all_tokens() -> None:
    scores = torch.arange(6.0)[None]
    assert torch.equal(Warpers([GenerationConfig().updated(top_k=2**70)], torch.device("cpu"))(scores), scores)


@pytest.mark.parametrize(
    "said",
    [
        {"sequence_bias": {(2, V): 1.0}}, {"bad_words_ids": [[V]]}, {"forced_bos_token_id": V},
        {"forced_eos_token_id": [1, V]}, {"suppress_tokens": [V]}, {"begin_suppress_tokens": (V,)},
    ],
)  # fmt: skip
def test_ids_outside_the_vocabulary_are_refused(said: dict[str, Any]) -> None:
    with pytest.raises(
        InputError, match=rf"{next(iter(said))} names token {V}, which is outside the vocabulary of {V}"
    ):
        read(**said)


def test_a_minimum_above_the_maximum_is_refused() -> None:
    with pytest.raises(InputError, match="min_length=9 is more than max_length=8"):
        read(min_length=9, max_length=8)


def test_a_decay_without_an_end_token_is_refused() -> None:
    with pytest.raises(InputError, match="cannot be honoured: the call has no end token"):
        read(exponential_decay_length_penalty=(2, 1.5), eos_token_id=())


def test_biases_are_read_in_the_forms_of_python_and_of_json_files() -> None:
    forms: tuple[Any, ...] = (
        {(5, 7): -2.0, (3,): 1}, [[[5, 7], -2.0], [[3], 1]], {"(5, 7)": -2.0, "(3,)": 1}, {"5,7": -2, "3": 1.0},
    )  # fmt: skip
    for form in forms:
        fields = read_fields(GenerationConfig(extra={"sequence_bias": form}))
        assert fields.sequence_bias == {(5, 7): -2.0, (3,): 1.0}


def test_empty_lists_of_tokens_say_nothing() -> None:
    read(suppress_tokens=[], begin_suppress_tokens=[])


def test_the_groups_of_fields_do_not_overlap_and_sampling_is_the_cores() -> None:
    groups = (COMMON_FIELDS, SAMPLING_FIELDS, WATERMARK_FIELDS, GUIDANCE_FIELDS, OUTPUT_FIELDS)
    assert sum(map(len, groups)) == len(frozenset().union(*groups))
    assert PROCESSOR_FIELDS < COMMON_FIELDS
    assert {*SAMPLING, *EXTRA_SAMPLING} == SAMPLING_FIELDS


def test_time_is_counted_from_the_start_of_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(criteria.time, "monotonic", lambda: now)
    ids = torch.zeros(3, 2, dtype=torch.int64)
    first, clock = call_criteria(GenerationConfig(extra={"max_time": 1.5}), [lambda ids, scores: ids[:, 0] > 0])
    assert isinstance(clock, MaxTime)
    now = 101.4
    assert clock(ids, None).tolist() == [False] * 3
    now = 101.6
    assert clock(ids, None).tolist() == [True] * 3
    assert first(ids, None).tolist() == [False] * 3
    assert call_criteria(GenerationConfig()) == ()


@pytest.mark.parametrize("seconds", [0, -1, True, float("inf"), "soon"])
def test_a_time_that_makes_no_sense_is_refused(seconds: Any) -> None:
    with pytest.raises(InputError, match="max_time=.* makes no sense: it must be a number > 0"):
        call_criteria(GenerationConfig(extra={"max_time": seconds}))
