"""SynthID text: the numbers of the reference, and what the detector finds in marked and unmarked text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pluglm_watermark.synthid import SynthIDTextWatermarkDetector, SynthIDTextWatermarkingConfig

from pluglm.errors import InputError

V = 307
KEYS = (654, 400, 836, 123, 340, 443, 597, 160, 57)
CONFIGS: list[dict[str, Any]] = [
    {"ngram_len": 5, "keys": KEYS},
    {"ngram_len": 2, "keys": KEYS[:3], "context_history_size": 4, "sampling_table_size": 999, "sampling_table_seed": 6},
    {"ngram_len": 3, "keys": KEYS, "skip_first_ngram_calls": True},
]


def marked(config: SynthIDTextWatermarkingConfig, length: int, seed: int = 0) -> list[int]:
    """Tokens drawn from random scores after the watermark."""
    draw = torch.Generator().manual_seed(seed)
    process = config.construct_processor(V, "cpu")
    ids = [3, 5, 8]
    for _ in range(length):
        scores = process(torch.tensor([ids]), torch.randn(1, V, generator=draw))
        ids.append(int(torch.multinomial(scores.softmax(-1), 1, generator=draw)))
    return ids[3:]


@pytest.mark.parametrize("said", CONFIGS, ids=str)
def test_the_scores_of_a_run_are_those_of_the_reference(said: dict[str, Any]) -> None:
    reference = pytest.importorskip("transformers")
    theirs = reference.SynthIDTextWatermarkingConfig(**{**said, "keys": list(said["keys"])}).construct_processor(
        V, "cpu"
    )
    ours = SynthIDTextWatermarkingConfig(**said).construct_processor(V, "cpu")
    draw = torch.Generator().manual_seed(1)
    ids = torch.randint(V, (4, 6), generator=draw)
    for _ in range(14):
        scores = torch.randn(4, V, generator=draw)
        assert torch.equal(ours(ids, scores.clone()), theirs(ids, scores.clone()))
        new = torch.randint(3, (4, 1), generator=draw)  # few tokens, so that contexts come again
        ids = torch.cat((ids, new), dim=1)


def test_a_row_gets_the_same_marks_in_any_batch_and_order() -> None:
    config = SynthIDTextWatermarkingConfig(ngram_len=3, keys=KEYS)
    process, again = (config.construct_processor(V, "cpu") for _ in range(2))
    prompt = torch.randint(V, (3, 4))
    process(prompt, torch.zeros(3, V))
    again(prompt[:1], torch.zeros(1, V))
    longer, scores = torch.cat((prompt, torch.randint(V, (3, 5))), dim=1), torch.randn(3, V)
    whole = process(longer, scores)
    order = torch.tensor([2, 0, 1])
    assert torch.equal(process(longer[order], scores[order]), whole[order])
    assert torch.equal(again(longer[:1], scores[:1]), whole[:1])


def test_marked_text_is_found_and_other_text_is_not() -> None:
    config = SynthIDTextWatermarkingConfig(ngram_len=4, keys=KEYS)
    detector = SynthIDTextWatermarkDetector(config)
    found = detector([marked(config, 150, seed) for seed in range(3)])
    assert found.prediction.all()
    assert (found.score > 0.55).all()
    plain = torch.randint(V, (3, 150), generator=torch.Generator().manual_seed(2))
    assert not detector(plain).prediction.any()
    other = SynthIDTextWatermarkDetector(SynthIDTextWatermarkingConfig(ngram_len=4, keys=[key + 1 for key in KEYS]))
    assert not other([marked(config, 150)]).prediction.any(), "other keys find nothing"


def test_unmarked_text_scores_as_often_as_the_p_value_says() -> None:
    detector = SynthIDTextWatermarkDetector(SynthIDTextWatermarkingConfig(ngram_len=3, keys=KEYS))
    rows = torch.randint(5000, (400, 60), generator=torch.Generator().manual_seed(4))
    p = detector(rows).p_value
    assert 0.05 < (p < 0.1).double().mean() < 0.15
    assert 0.43 < (p < 0.5).double().mean() < 0.57


def test_the_numbers_are_those_of_the_reference_without_repeated_contexts() -> None:
    reference = pytest.importorskip("transformers")
    said = {"ngram_len": 3, "keys": list(KEYS)}
    theirs = reference.SynthIDTextWatermarkingConfig(**said).construct_processor(V, "cpu")
    ids = torch.randint(4, (1, 40), generator=torch.Generator().manual_seed(3))
    numbers = theirs.compute_g_values(ids)[0]
    fresh = theirs.compute_context_repetition_mask(ids)[0]
    detector = SynthIDTextWatermarkDetector(SynthIDTextWatermarkingConfig(**said))
    assert torch.equal(detector.numbers(ids[0].tolist()), numbers[fresh])


def test_what_follows_an_end_token_and_padding_is_left_out() -> None:
    config = SynthIDTextWatermarkingConfig(ngram_len=3, keys=KEYS)
    row = [t for t in marked(config, 60) if t != 1]
    detector = SynthIDTextWatermarkDetector(config, eos_token_id=1)
    alone = detector([row]).score
    assert torch.equal(detector([[*row, 1, 7, 7, 7, 8]]).score, alone)
    ids, mask = torch.tensor([[9, 9, *row]]), torch.tensor([[0, 0, *[1] * len(row)]])
    assert torch.equal(detector(ids, mask).score, alone)


@pytest.mark.parametrize(
    ("said", "message"),
    (
        ({"ngram_len": 1, "keys": [1]}, r"ngram_len=1 makes no sense: it must be an integer >= 2"),
        ({"ngram_len": 3, "keys": []}, r"keys=\(\) makes no sense"),
        ({"ngram_len": 3, "keys": [1], "context_history_size": 0}, r"context_history_size=0"),
        ({"ngram_len": 3, "keys": [1], "sampling_table_size": 2**25}, r"sampling_table_size=33554432"),
    ),
)
def test_settings_that_make_no_sense_are_refused(said: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        SynthIDTextWatermarkingConfig(**said)


def test_a_text_too_short_to_score_is_refused() -> None:
    with pytest.raises(InputError, match=r"(?s)row 0 has 2 tokens.*Pass a longer text"):
        SynthIDTextWatermarkDetector(SynthIDTextWatermarkingConfig(ngram_len=3, keys=KEYS))([[1, 2]])
