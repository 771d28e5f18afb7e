"""Modules are built without storage and without initial values; what is not on the meta device is filled as ever."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pluglm.unfilled import unfilled


@pytest.mark.parametrize(
    "layer",
    [
        lambda: nn.Embedding(11, 6), lambda: nn.Embedding(11, 6, padding_idx=3), lambda: nn.Linear(6, 10),
        lambda: nn.Conv1d(4, 8, 3), lambda: nn.LayerNorm(6), lambda: nn.MultiheadAttention(8, 2), lambda: nn.LSTM(4, 5),
    ],
)  # fmt: skip
def test_a_layer_has_shapes_and_no_storage(layer: type[nn.Module]) -> None:
    with unfilled():
        made = layer()
    want = layer()
    assert all(t.is_meta for t in made.parameters())
    shapes = [(name, t.shape, t.dtype) for name, t in made.named_parameters()]
    assert shapes == [(name, t.shape, t.dtype) for name, t in want.named_parameters()]


def test_filling_by_hand_gives_the_tensor_back() -> None:
    with unfilled():
        weight = nn.Parameter(torch.empty(6, 5))
        filled = [
            nn.init.normal_(weight), nn.init.uniform_(tensor=weight), nn.init.kaiming_uniform_(weight, a=2),
            nn.init.xavier_normal_(weight), weight.data.normal_(0, 1),
        ]  # fmt: skip
    assert all(t is weight for t in filled[:4])
    assert filled[4].is_meta


def test_what_is_made_elsewhere_is_filled() -> None:
    with unfilled():
        drawn = nn.init.normal_(torch.full((50,), 7.0, device="cpu"))
    assert not (drawn == 7).any()
