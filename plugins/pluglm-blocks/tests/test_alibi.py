"""Slopes of linear attention biases, against the paper's words and against both ways published code writes them."""

from __future__ import annotations

import math

import pytest
from pluglm_blocks.reading import alibi_slopes


def by_ratio(num_heads: int) -> list[float]:
    """The paper's code: a geometric series that starts at its own ratio; what is missing comes from twice as many."""
    n = 2 ** math.floor(math.log2(num_heads))
    ratio = 2 ** (-(2 ** -(math.log2(n) - 3)))
    slopes = [ratio**i for i in range(1, n + 1)]
    return slopes if n == num_heads else slopes + by_ratio(2 * n)[::2][: num_heads - n]


def by_dealing(num_heads: int, max_exponent: int) -> list[float]:
    """MPT's code: the series of the next power of two, the even places first, then the odd ones, as many as needed."""
    n = 2 ** math.ceil(math.log2(num_heads))
    slopes = [1 / 2 ** (i * max_exponent / n) for i in range(1, n + 1)]
    return slopes if n == num_heads else (slopes[1::2] + slopes[::2])[:num_heads]


def test_eight_heads_have_the_papers_slopes() -> None:
    assert alibi_slopes(8) == (1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256)


def test_sixteen_heads_have_the_geometric_means_between() -> None:
    slopes = alibi_slopes(16)
    assert slopes[1::2] == alibi_slopes(8)
    assert slopes[0] == pytest.approx(2**-0.5)


def test_heads_beyond_a_power_of_two_fall_between() -> None:
    assert alibi_slopes(6) == (2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3)
    assert alibi_slopes(3) == (2**-4, 2**-8, 2**-2)
    assert alibi_slopes(1) == (2**-8,)


@pytest.mark.parametrize("num_heads", range(1, 130))
def test_slopes_are_those_of_published_code(num_heads: int) -> None:
    assert alibi_slopes(num_heads) == pytest.approx(by_ratio(num_heads))
    assert alibi_slopes(num_heads) == pytest.approx(by_dealing(num_heads, 8))
    assert alibi_slopes(num_heads, max_exponent=16) == pytest.approx(by_dealing(num_heads, 16))


@pytest.mark.parametrize("num_heads", [*range(1, 130), 112])
def test_every_head_has_a_slope_of_its_own(num_heads: int) -> None:
    slopes = alibi_slopes(num_heads)
    assert len(set(slopes)) == len(slopes) == num_heads
    assert min(slopes) == 2**-8
    assert max(slopes) < 1
