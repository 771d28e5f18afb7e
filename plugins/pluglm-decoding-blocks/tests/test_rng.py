"""Philox against its published answers; draws that depend on seed and position alone."""

from __future__ import annotations

import pytest
import torch
from pluglm_decoding_blocks.draw import draw
from pluglm_decoding_blocks.rng import Uniforms, philox, row_seeds, signed, uniforms

# Random123 1.09, examples/kat_vectors, "philox4x32 10": counter, key -> result.
KNOWN = (
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
)


@pytest.mark.parametrize(("counter", "key", "expected"), KNOWN)
def test_philox_gives_the_published_answers(counter: str, key: str, expected: str) -> None:
    words = [[torch.tensor([int(word, 16)]) for word in text.split()] for text in (counter, key)]
    assert " ".join(f"{int(word):08x}" for word in philox(*words)) == expected


def test_uniforms_lie_in_the_unit_interval_and_are_spread_evenly() -> None:
    u = uniforms(torch.arange(200)[:, None], torch.arange(500)[None])
    assert u.dtype == torch.float64
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    counts = torch.histc(u.float(), 20, 0, 1)
    chi_square = float(((counts - 5000) ** 2 / 5000).sum())
    assert chi_square < 43.8  # 19 degrees of freedom, p = 0.001


def test_blocks_of_draws_are_the_single_draws() -> None:
    seeds = torch.tensor([3, -5, 2**62])
    numbers = Uniforms(seeds)
    for position in (0, 1, 127, 128, 129, 5, 4000):
        assert torch.equal(numbers.at(position), uniforms(seeds, torch.tensor(position)))


def test_rows_at_different_positions_have_their_own_draws() -> None:
    seeds = torch.tensor([3, -5, 2**62])
    numbers = Uniforms(seeds)
    for rows, positions in (([0, 1, 2], [4, 9, 100]), ([2, 0], [127, 128]), ([1], [500])):
        expected = torch.stack(
            [uniforms(seeds[row], torch.tensor(at)) for row, at in zip(rows, positions, strict=True)]
        )
        assert torch.equal(numbers.each(rows, positions), expected)


def test_rows_of_one_seed_draw_differently_and_row_0_as_alone() -> None:
    seeds = row_seeds(7, 5)
    assert seeds[0] == 7
    assert len(set(seeds)) == 5
    assert row_seeds(7, 3) == seeds[:3]
    assert row_seeds((7, 8), 2) == [7, 8]
    assert row_seeds(2**64 - 1, 1) == [-1] == [signed(2**64 - 1)]


def test_without_a_seed_every_call_is_another() -> None:
    assert row_seeds(None, 1) != row_seeds(None, 1)


def test_tokens_are_drawn_as_often_as_their_probabilities_say() -> None:
    scores = torch.tensor([[0.0, 1.0, -torch.inf, 2.0, -1.0, 0.5]])
    n = 50_000
    u = uniforms(torch.arange(n), torch.tensor(3))
    counts = torch.bincount(draw(scores.expand(n, -1), u), minlength=6)
    expected = scores[0].double().softmax(-1) * n
    assert counts[2] == 0
    real = expected > 0
    chi_square = float(((counts - expected)[real] ** 2 / expected[real]).sum())
    assert chi_square < 18.5  # 4 degrees of freedom, p = 0.001


def test_the_ends_of_the_interval_never_give_a_forbidden_token() -> None:
    scores = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.1, -torch.inf]]).expand(3, -1)
    assert draw(scores, torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)).tolist() == [1, 3, 3]
