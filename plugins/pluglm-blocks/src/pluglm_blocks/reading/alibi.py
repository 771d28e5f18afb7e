"""Slopes of linear attention biases: how much farther keys lose, head by head."""

from __future__ import annotations


def alibi_slopes(num_heads: int, *, max_exponent: float = 8.0) -> tuple[float, ...]:
    """The slope of each head, as `AttentionSpec.alibi_slopes` wants them: positive, one a head.

    For n heads, n a power of two, they are 2 ** (-e/n), 2 ** (-2e/n) … 2 ** -e. For other numbers: those of the largest
    power of two below, then every other one, from the first, of twice as many heads, which fall between them.

    Args:
        num_heads: H, above zero. max_exponent: e, the paper's 8 (MPT-7B-StoryWriter: 16).
    Source: Press et al. 2022, "Train Short, Test Long: Attention with Linear Biases", section 3; numbers that are no
        powers of two as in that paper's published code.
    """
    n = 1 << (num_heads.bit_length() - 1)  # the largest power of two that is not above
    powers = [2.0 ** (-max_exponent * i / n) for i in range(1, n + 1)]
    between = [2.0 ** (-max_exponent * i / (2 * n)) for i in range(1, 2 * (num_heads - n), 2)]
    return tuple(powers + between)
