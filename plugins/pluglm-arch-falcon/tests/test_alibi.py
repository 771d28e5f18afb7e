"""Falcon's slopes against what its code computes, and how far the one step that is left out goes."""

from __future__ import annotations

import pytest
import torch
from pluglm_arch_falcon.alibi import bfloat16, scaled_slopes
from pluglm_blocks.reading import alibi_slopes
from torch import Tensor


def biases_as_written(num_heads: int, head_dim: int, length: int) -> Tensor:
    """[H, S]: slopes and their products with positions in bfloat16, then divided, as the reference does."""
    slopes = torch.tensor(alibi_slopes(num_heads)).bfloat16()
    return (slopes[:, None] * torch.arange(length)).float() / head_dim**0.5


def biases(num_heads: int, head_dim: int, length: int) -> Tensor:
    """[H, S], as a backend computes them from the slopes, up to a number that all keys share."""
    return torch.tensor(scaled_slopes(num_heads, head_dim))[:, None] * torch.arange(length)


@pytest.mark.parametrize("value", [*alibi_slopes(71), 1.0, 1.00390625, 1.01171875, 3.3e38])
def test_rounding_to_bfloat16_is_torch_s(value: float) -> None:
    assert bfloat16(value) == float(torch.tensor(value, dtype=torch.float32).bfloat16())


def test_ties_are_rounded_to_even() -> None:
    assert bfloat16(1 + 2**-8) == 1.0
    assert bfloat16(1 + 3 * 2**-8) == 1 + 2**-6


@pytest.mark.parametrize("num_heads", range(1, 9))
def test_up_to_eight_heads_are_exact_before_position_256(num_heads: int) -> None:
    assert torch.allclose(biases(num_heads, 20, 257), biases_as_written(num_heads, 20, 257), rtol=1e-6, atol=0)


def test_beyond_that_the_reference_rounds_and_we_do_not() -> None:
    """It rounds the position and then the product, each by at most 2 ** -8 of it."""
    ours, theirs = biases(32, 64, 2048), biases_as_written(32, 64, 2048)
    assert not torch.allclose(ours, theirs, rtol=1e-3)
    assert torch.allclose(ours, theirs, rtol=2**-7, atol=0)
    assert len(theirs[3, 512:1024].unique()) == 129  # slope 1/2: four neighbours share a step; the last rounds up
    assert len(ours[3, 512:1024].unique()) == 512
