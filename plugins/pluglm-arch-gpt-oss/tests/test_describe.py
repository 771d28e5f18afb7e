"""Configs as they are published, in both spellings, become the program that they mean, or are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pluglm_arch_gpt_oss import pluglm_describe_model as describe

from pluglm.contracts import Attention, DecoderProgram, Experts, FeedForward, KVSlot, Layer, Rope
from pluglm.errors import ConfigError

PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text())
SMALL = PUBLISHED["gpt-oss-20b"]


def as_v5(config: dict[str, Any]) -> dict[str, Any]:
    """The same config as Transformers 5 writes it."""
    config = dict(config)
    scaling, theta = config.pop("rope_scaling"), config.pop("rope_theta")
    return {**config, "rope_parameters": {"rope_theta": theta, **scaling}, "swiglu_alpha": 1.702}


def program(**changes: Any) -> DecoderProgram:
    described = describe({**SMALL, **changes}).program
    assert described is not None
    return described


def attention(layer: Layer) -> Attention:
    op = layer.branches[0].parts[0].op
    assert isinstance(op, Attention)
    return op


def windows(described: DecoderProgram) -> list[int | None]:
    found = [attention(layer).spec.mask.window for layer in described.layers]
    assert found == [slot.window for slot in described.slots if isinstance(slot, KVSlot)]
    return found


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read_and_every_key_accounted_for(name: str) -> None:
    config = PUBLISHED[name]
    described = describe(config)
    assert described.num_layers == config["num_hidden_layers"]
    assert {key.partition(".")[0] for key in described.used} | set(described.ignored) >= set(config)
    assert described.max_seq_len == 131_072
    assert (described.eos_token_ids, described.bos_token_id, described.pad_token_id) == ((200_002,), None, 199_999)
    assert described.program is not None
    assert DecoderProgram.from_json(json.loads(json.dumps(described.program.to_json()))) == described.program


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_spelling_of_transformers_5_means_the_same(name: str) -> None:
    assert describe(as_v5(PUBLISHED[name])).program == describe(PUBLISHED[name]).program


def test_describing_a_model_imports_no_torch() -> None:
    code = (
        "import json, sys; from pluglm_arch_gpt_oss import pluglm_describe_model as d\n"
        "for config in json.load(sys.stdin).values(): d(config)\n"
        "heavy = [m for m in ('torch', 'numpy') if m in sys.modules]; assert not heavy, heavy"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(PUBLISHED), text=True, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_attention_has_sinks_and_biases_and_rotates_by_yarn_that_is_not_truncated() -> None:
    op = attention(program().layers[3])
    assert op.spec.sinks
    assert (op.spec.num_heads, op.spec.num_kv_heads, op.spec.head_dim, op.spec.scale) == (64, 8, 64, 0.125)
    assert op.q_bias and op.k_bias and op.v_bias and op.o_bias
    assert op.rope is not None
    assert dict(op.rope.parameters) == {
        "beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
        "truncate": False,
    }  # fmt: skip
    unbiased = attention(program(attention_bias=False).layers[0])
    assert not (unbiased.q_bias or unbiased.k_bias or unbiased.v_bias or unbiased.o_bias)


def test_every_other_layer_has_the_window_by_types_or_without_them() -> None:
    assert windows(program()) == [128, None] * 12
    assert windows(program(layer_types=None)) == [128, None] * 12
    assert windows(program(layer_types=["full_attention"] * 23 + ["sliding_attention"])) == [None] * 23 + [128]


def test_experts_are_clamped_and_chosen_by_a_softmax_over_the_chosen() -> None:
    (op,) = {layer.branches[1].parts[0].op for layer in program(swiglu_limit=5.0).layers}
    assert op == Experts(
        FeedForward(2880, 2880, "silu", bias=True), 32, 4, scoring="softmax_topk", router_bias=True, clamp=5.0,
        alpha=1.702,
    )  # fmt: skip
    other = program(swiglu_alpha=1.5).layers[0].branches[1].parts[0].op
    assert isinstance(other, Experts)
    assert (other.clamp, other.alpha) == (7.0, 1.5)


def test_without_rotary_numbers_the_references_stand_in() -> None:
    silent = {key: value for key, value in SMALL.items() if key not in ("rope_scaling", "rope_theta")}
    assert describe(silent).program == describe(SMALL).program
    plain = attention(program(rope_scaling={"rope_type": "default"}).layers[0])
    assert plain.rope == Rope("default", 150_000.0, 64, max_seq_len=131_072)


ROWS: list[tuple[dict[str, Any], str, list[str]]] = [
    ({"hidden_act": "gelu"}, "hidden_act", ['activation "gelu"', "swiglu_limit"]),
    ({"swiglu_limit": 0.0}, "swiglu_limit", ["clamps experts to 0.0", "above zero"]),
    ({"experts_per_token": 2}, "experts_per_token", ["num_experts_per_tok = 4", "experts_per_token = 2"]),
    ({"num_experts_per_tok": 33, "experts_per_token": 33}, "num_experts_per_tok", ["33 of 32 experts"]),
    ({"num_local_experts": None}, "num_local_experts", ['lacks "num_local_experts"']),
    ({"sliding_window": None}, "layer_types", ["no window for them"]),
    ({"layer_types": ["chunked_attention"] * 24}, "layer_types", ["'chunked_attention'"]),
    ({"layer_types": ["full_attention"]}, "layer_types", ["1 entries for 24 layers"]),
    ({"norm_topk_prob": True}, "norm_topk_prob", ["read by nobody"]),
    ({"model_type": "gptoss"}, "model_type", ["'gptoss'", "gpt_oss"]),
]


@pytest.mark.parametrize(("changes", "key", "words"), ROWS, ids=[f"{row[1]}-{i}" for i, row in enumerate(ROWS)])
def test_a_config_that_cannot_be_honoured_is_refused(changes: dict[str, Any], key: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        describe({**SMALL, **changes})
    assert caught.value.key == key
    for word in words:
        assert word in str(caught.value)
