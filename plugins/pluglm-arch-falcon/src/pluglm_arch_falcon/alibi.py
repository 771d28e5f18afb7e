"""Falcon's linear biases: rounded as its code rounds them, and divided like the scores they are added to."""

from __future__ import annotations

import struct

from pluglm_blocks.reading import alibi_slopes


def scaled_slopes(num_heads: int, head_dim: int) -> tuple[float, ...]:
    """The slopes of Falcon, as they are added to scaled scores.

    Falcon adds biases before it scales, (q·k + b) / sqrt(D), so slopes are divided by sqrt(D) as well. (Press et al.
    2022 add them to scaled scores.) And it takes slopes in bfloat16, which this function does exactly.

    An approximation: the reference also rounds positions, and their products with slopes, to bfloat16, so that biases
    become steps, wider the farther into a text (from position 256 on, two neighbours share one; from 512 on, four). The
    result depends on where a text begins, which no slope can say. Nothing is rounded before position 256 if slopes are
    powers of two, which they are for 8 heads or fewer.
    """
    return tuple(bfloat16(slope) * head_dim**-0.5 for slope in alibi_slopes(num_heads))


def bfloat16(value: float) -> float:
    """The nearest number that bfloat16 can say, ties to even: the upper half of a float32. value: finite and normal."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    bits += 0x7FFF + ((bits >> 16) & 1)
    rounded: float = struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))[0]
    return rounded
