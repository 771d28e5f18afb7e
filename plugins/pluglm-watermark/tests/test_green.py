"""Green lists: the numbers of the reference, and what its detector and ours find in marked and unmarked text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pluglm_watermark.green import WatermarkDetector, WatermarkingConfig

from pluglm.errors import InputError

V = 307


def marked(config: WatermarkingConfig, length: int, seed: int = 0) -> list[int]:
    """Tokens drawn from random scores after the watermark: text without any other order."""
    draw = torch.Generator().manual_seed(seed)
    process = config.construct_processor(V, "cpu")
    ids = [3, 5, 8]
    for _ in range(length):
        scores = process(torch.tensor([ids]), torch.randn(1, V, generator=draw))
        ids.append(int(torch.multinomial(scores.softmax(-1), 1, generator=draw)))
    return ids[3:]


CONFIGS: list[dict[str, Any]] = [
    {},
    {"greenlist_ratio": 0.4, "bias": 1.5, "hashing_key": 77, "context_width": 2},
    {"seeding_scheme": "selfhash"},
    {"seeding_scheme": "selfhash", "context_width": 3, "hashing_key": 2**61 - 1},
]


@pytest.mark.parametrize("said", CONFIGS, ids=str)
def test_the_scores_are_those_of_the_reference(said: dict[str, Any]) -> None:
    reference = pytest.importorskip("transformers")
    theirs = reference.WatermarkingConfig(**said).construct_processor(V, "cpu")
    ours = WatermarkingConfig(**said).construct_processor(V, "cpu")
    draw = torch.Generator().manual_seed(1)
    for width in (1, 2, 5, 9):
        ids = torch.randint(V, (4, width), generator=draw)
        scores = torch.randn(4, V, generator=draw)
        assert torch.equal(ours(ids, scores.clone()), theirs(ids, scores.clone()))


@pytest.mark.parametrize("said", CONFIGS, ids=str)
@pytest.mark.parametrize("once", (False, True))
def test_the_detector_counts_as_the_reference_does(said: dict[str, Any], once: bool) -> None:
    reference = pytest.importorskip("transformers")
    config = WatermarkingConfig(**said)
    rows = torch.tensor([marked(config, 40, seed) for seed in range(2)])
    model_config = reference.LlamaConfig(vocab_size=V, bos_token_id=1)
    theirs = reference.WatermarkDetector(
        model_config, "cpu", reference.WatermarkingConfig(**said), ignore_repeated_ngrams=once
    )
    wanted = theirs(rows, return_dict=True)
    found = WatermarkDetector(config, vocab_size=V, bos_token_id=1, ignore_repeated_ngrams=once)(rows)
    for name in ("num_tokens_scored", "num_green_tokens", "green_fraction", "z_score", "p_value", "confidence"):
        assert torch.allclose(getattr(found, name).double(), torch.from_numpy(getattr(wanted, name)).double()), name
    assert found.prediction.tolist() == wanted.prediction.tolist()


@pytest.mark.parametrize("scheme", ("lefthash", "selfhash"))
def test_marked_text_is_found_and_other_text_is_not(scheme: Any) -> None:
    config = WatermarkingConfig(seeding_scheme=scheme, bias=3.0)
    plain = torch.randint(V, (3, 120), generator=torch.Generator().manual_seed(2)).tolist()
    detector = WatermarkDetector(config, vocab_size=V)
    assert detector([marked(config, 120, seed) for seed in range(3)]).prediction.all()
    assert not detector(plain).prediction.any()
    other = WatermarkDetector(WatermarkingConfig(seeding_scheme=scheme, hashing_key=99), vocab_size=V)
    assert not other([marked(config, 120)]).prediction.any(), "another key finds nothing"


def test_padding_and_a_leading_bos_are_left_out() -> None:
    config = WatermarkingConfig()
    row = marked(config, 30)
    detector = WatermarkDetector(config, vocab_size=V, bos_token_id=1)
    alone = detector([row])
    padded = torch.tensor([[9, 9, *row], [1, *row, 9]])
    mask = torch.tensor([[0, 0, *[1] * 30], [1, *[1] * 30, 0]])
    both = detector(padded, mask)
    assert both.z_score.tolist() == alone.z_score.tolist() * 2


def test_a_row_gets_the_same_marks_in_any_batch() -> None:
    process = WatermarkingConfig(seeding_scheme="selfhash", context_width=2).construct_processor(V, "cpu")
    ids, scores = torch.randint(V, (5, 7)), torch.randn(5, V)
    whole = process(ids, scores)
    for row in (3, 0):
        assert torch.equal(process(ids[row : row + 1], scores[row : row + 1]), whole[row : row + 1])


@pytest.mark.parametrize(
    ("said", "message"),
    (
        ({"greenlist_ratio": 1.0}, r"greenlist_ratio=1.0 makes no sense: it must be a number between 0 and 1"),
        ({"bias": float("nan")}, r"bias=nan makes no sense"),
        ({"hashing_key": 0}, r"hashing_key=0 makes no sense"),
        ({"seeding_scheme": "left"}, r"seeding_scheme='left' makes no sense: it must be 'lefthash' or 'selfhash'"),
        ({"context_width": 0}, r"context_width=0 makes no sense"),
    ),
)
def test_settings_that_make_no_sense_are_refused(said: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        WatermarkingConfig(**said)


def test_a_text_too_short_to_score_is_refused() -> None:
    with pytest.raises(InputError, match=r"(?s)row 1 has 1 tokens.*Pass a longer text"):
        WatermarkDetector(WatermarkingConfig(), vocab_size=V)([[1, 2, 3], [4]])
