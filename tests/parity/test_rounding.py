"""What float32 cannot show: in bfloat16, Gemma rounds its embeddings and its norms where the reference does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import kit
import pytest
import torch
from torch import Tensor

import pluglm

GEMMAS = ("gemma-plain", "gemma2-types", "gemma3-types")
#: Of the numbers of a norm; those that the two sides sum in another order may fall on the other side of a tie.
FEW, MANY = 0.002, 0.05


@pytest.fixture(scope="module")
def halves(folder: Callable[[str], Path]) -> Callable[[str], tuple[Any, Any]]:
    """Variant -> the model here and in Transformers, both in bfloat16."""
    from transformers import AutoModelForCausalLM

    def load(name: str) -> tuple[Any, Any]:
        lm = pluglm.load(
            folder(name), dtype="bfloat16", device="cpu", attention="eager", cache="dynamic", decoding="greedy",
            executor="executor/eager", manager=kit.manager(),
        )  # fmt: skip
        theirs = AutoModelForCausalLM.from_pretrained(
            folder(name), attn_implementation="eager", dtype=torch.bfloat16
        ).eval()
        return lm.model, theirs

    return load


def unequal(one: Tensor, other: Tensor) -> float:
    """The share of numbers that differ at all."""
    assert one.dtype == other.dtype == torch.bfloat16
    return float((one != other).float().mean())


@pytest.mark.parametrize("name", GEMMAS)
def test_embeddings_are_multiplied_by_the_rounded_root(name: str, halves: Any) -> None:
    ours, theirs = halves(name)
    token_ids = kit.prompt(90)[None]
    with torch.no_grad():
        got = ours(token_ids, output_hidden_states=True).hidden_states[0]
        want = theirs(token_ids, output_hidden_states=True).hidden_states[0]
    assert torch.equal(got, want)
    exact = (ours.module.embed(token_ids).float() * 48**0.5).bfloat16()
    assert unequal(exact, want) > MANY, "this checkpoint cannot tell a rounded root from an exact one"


@pytest.mark.parametrize("name", GEMMAS)
def test_norms_multiply_before_they_round(name: str, halves: Any) -> None:
    ours, theirs = halves(name)
    x = torch.randn(1, 90, 48, generator=torch.Generator().manual_seed(5)).bfloat16()
    with torch.no_grad():
        got, want = ours.module.layers[1].attn_norm_in(x), theirs.model.layers[1].input_layernorm(x)
        weight = theirs.model.layers[1].input_layernorm.weight
        early = torch.nn.functional.rms_norm(x.float(), (48,), eps=1e-4).bfloat16() * (1 + weight)
    assert unequal(got, want) <= FEW
    assert unequal(early, want) > MANY, "this checkpoint cannot tell the two orders apart"
