"""Mixtures of experts against the torch module: every way to choose them, to weigh them and to add them up."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from native_models import NORM, ROPE, SPEC, Nearest, Pair, close, layer, llama, make, with_library

from pluglm import UnsupportedRequestError
from pluglm.contracts import Attention, Branch, DecoderProgram, Embedding, Experts, FeedForward, Layer, Part

ONE = FeedForward(24, 20, "silu")
ODD = FeedForward(24, 13, "gelu_tanh", gated=False, bias=True, down_scale=1.3)
CLAMPED = {"scoring": "softmax_topk", "router_bias": True, "clamp": 0.7, "alpha": 1.702}
#: As Mixtral, Qwen 3, gpt-oss, DeepSeek-V2 and -V3 and Qwen 2 choose and add up, and what no model combines.
MIXTURES = {
    "mixtral": Experts(ONE, 5, 2),
    "qwen3_moe": Experts(ONE, 7, 3, normalise=False),
    "gpt_oss": Experts(dataclasses.replace(ONE, bias=True), 5, 2, **CLAMPED),
    "deepseek_v2": Experts(ONE, 6, 2, normalise=False, scale=1.4, num_groups=3, top_k_groups=2, shared=ODD),
    "deepseek_v3": Experts(
        ONE, 8, 3, scoring="sigmoid", scale=2.5, correction_bias=True, num_groups=4, top_k_groups=2, shared=ONE
    ),
    "qwen2_moe": Experts(ONE, 4, 4, normalise=False, shared=FeedForward(24, 30, "silu"), shared_gate=True),
    "plain experts": Experts(ODD, 5, 1),
    "factors": Experts(dataclasses.replace(ONE, gate_scale=0.6, down_scale=1.4), 5, 2),
}


def mixture(op: Experts, **changed: Any) -> DecoderProgram:
    """Two layers, the second's feed-forward replaced by experts; `changed` fields of its part."""
    part = dataclasses.replace(Part("mlp", op, norm_in=NORM), **changed)
    return llama(layer(0), dataclasses.replace(layer(1), branches=(layer(1).branches[0], Branch((part,)))))


def check(pair: Pair, rows: int = 3) -> None:
    """Passes of one and of some tokens a row, and a prompt by torch between them."""
    one, two = pair.cache(rows), pair.cache(rows)
    for i, count in enumerate((1, 5, 1, 9, 1)):
        ids = [[(7 * b + 3 * t + i) % 37 for t in range(count)] for b in range(rows)]
        close(pair, pair.feed("cpu", one, ids), pair.feed("torch", two, ids))
    assert pair.executor.native_passes == 4


@with_library
@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_chosen_weighed_and_added_as_in_the_torch_module(name: str) -> None:
    for threads in (1, 3):
        check(make(mixture(MIXTURES[name]), threads=threads))


@with_library
def test_experts_beside_scales_and_a_norm_behind_them() -> None:
    op = MIXTURES["deepseek_v3"]
    check(make(mixture(op, norm_out=NORM, scale_in=0.8, scale_out=1.7), threads=2))
    check(make(mixture(op, scale_out=0.3), threads=2))


@with_library
@pytest.mark.parametrize("name", ["qwen2_moe", "gpt_oss", "deepseek_v3"])
def test_experts_in_bfloat16(name: str) -> None:
    """All experts are chosen: rounding to bfloat16 turns close choices, in the torch module."""
    op = dataclasses.replace(MIXTURES[name], top_k=MIXTURES[name].num_experts, num_groups=1, top_k_groups=1)
    check(make(mixture(op), dtype="bfloat16", threads=2))


@with_library
def test_a_shared_expert_may_be_packed_and_the_experts_stay_plain() -> None:
    norm = dataclasses.replace(NORM, size=32)
    op = Experts(FeedForward(32, 20, "silu"), 5, 2, shared=FeedForward(32, 64, "silu"), shared_gate=True)
    layers = tuple(
        Layer((
            Branch((Part("attn", Attention(SPEC, i, rope=ROPE), norm_in=norm),)),
            Branch((Part("mlp", op, norm_in=norm),)),
        ))
        for i in range(2)
    )  # fmt: skip
    program = llama(*layers, embedding=Embedding(37, 32), final_norm=norm)
    pair = make(program, quantizer=Nearest({"shared": 8}), threads=2)
    assert sorted(pair.executor._packed_modules) == sorted(
        f"layers.{i}.mlp.shared.{n}" for i in range(2) for n in ("down", "gate", "up")
    )
    one_cache, two_cache = pair.cache(2), pair.cache(2)
    prompt = [[(3 * t + b) % 37 for t in range(45)] for b in range(2)]  # in slices, as packed models read prompts
    for ids in ([[1, 2], [3, 4]], [[5], [6]], prompt, [[7], [8]]):
        got, want = pair.feed("cpu", one_cache, ids), pair.feed("torch", two_cache, ids)
        close(pair, got, want)
    assert pair.executor.torch_passes == 0


@with_library
def test_more_experts_than_there_is_room_for_are_refused() -> None:
    with pytest.raises(UnsupportedRequestError, match="room for 1024 experts, not for 1025"):
        make(mixture(Experts(ONE, 1025, 2)))
