"""The most likely tokens: those that torch finds, ties and NaN included."""

from __future__ import annotations

import pytest
import torch
from pluglm_decoding_blocks.best import most_likely


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize("shape", ((1, 307), (5, 307), (2, 3, 41), (7,)))
def test_it_is_what_torch_finds(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    scores = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    best, tokens = most_likely(scores)
    wanted = scores.max(-1)
    assert torch.equal(best, wanted.values)
    assert torch.equal(tokens, wanted.indices)
    assert (best.dtype, tokens.dtype) == (dtype, torch.int64)


def test_of_equal_scores_the_first_is_taken() -> None:
    scores = torch.tensor([[0.0, 2.0, 1.0, 2.0], [-torch.inf, -torch.inf, -torch.inf, -torch.inf]])
    best, tokens = most_likely(scores)
    assert tokens.tolist() == [1, 0]
    assert best.tolist() == [2.0, -torch.inf]


def test_nan_is_the_best_of_its_row_wherever_it_is() -> None:
    scores = torch.tensor([[0.0, float("nan"), 5.0], [1.0, 2.0, 3.0]])
    best, tokens = most_likely(scores)
    assert best.isnan().tolist() == [True, False]
    assert tokens.tolist() == [1, 2]


def test_slices_are_read_as_they_lie() -> None:
    logits = torch.randn(3, 4, 50)
    assert torch.equal(most_likely(logits[:, -1])[1], logits[:, -1].argmax(-1))
    assert torch.equal(most_likely(logits[1:, :, ::2])[1], logits[1:, :, ::2].argmax(-1))
