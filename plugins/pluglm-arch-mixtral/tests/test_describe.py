"""Configs as they are published, in both spellings, become the program that their model type means."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pluglm_arch_mixtral import pluglm_describe_model as describe

from pluglm.contracts import Attention, DecoderProgram, Experts, FeedForward, KVSlot, Layer, Norm
from pluglm.errors import ConfigError

PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text())


def as_v5(config: dict[str, Any]) -> dict[str, Any]:
    """The same config as Transformers 5 writes it."""
    config = {key: value for key, value in config.items() if key != "rope_scaling"}
    if "num_experts" in config:
        config["num_local_experts"] = config.pop("num_experts")
    return {**config, "rope_parameters": {"rope_theta": config.pop("rope_theta"), "rope_type": "default"}}


def program(name: str, **changes: Any) -> DecoderProgram:
    described = describe({**PUBLISHED[name], **changes}).program
    assert described is not None
    return described


def attention(layer: Layer) -> Attention:
    op = layer.branches[0].parts[0].op
    assert isinstance(op, Attention)
    return op


def mlp(layer: Layer) -> Experts | FeedForward:
    op = layer.branches[1].parts[0].op
    assert isinstance(op, Experts | FeedForward)
    return op


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read_and_every_key_accounted_for(name: str) -> None:
    config = PUBLISHED[name]
    described = describe(config)
    assert described.model_type == config["model_type"]
    assert described.num_layers == config["num_hidden_layers"]
    assert {key.partition(".")[0] for key in described.used} | set(described.ignored) >= set(config)
    assert described.program is not None
    assert DecoderProgram.from_json(json.loads(json.dumps(described.program.to_json()))) == described.program


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_spelling_of_transformers_5_means_the_same(name: str) -> None:
    assert describe(as_v5(PUBLISHED[name])).program == describe(PUBLISHED[name]).program


def test_describing_a_model_imports_no_torch() -> None:
    code = (
        "import json, sys; from pluglm_arch_mixtral import pluglm_describe_model as d\n"
        "for config in json.load(sys.stdin).values(): d(config)\n"
        "heavy = [m for m in ('torch', 'numpy') if m in sys.modules]; assert not heavy, heavy"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(PUBLISHED), text=True, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stderr


def test_mixtral_has_experts_in_every_layer_and_divides_their_weights() -> None:
    described = program("mixtral-8x22b")
    expert = FeedForward(6144, 16384, "silu")
    assert {mlp(layer) for layer in described.layers} == {Experts(expert, 8, 2, scoring="softmax", normalise=True)}
    assert attention(described.layers[55]).slot == 55
    assert attention(described.layers[0]).spec.head_dim == 128


def test_mixtral_has_one_window_for_all_layers_and_none_where_the_file_is_silent() -> None:
    windows = {layer: attention(layer).spec.mask.window for layer in program("mixtral-8x7b").layers}
    assert set(windows.values()) == {None}
    windowed = program("mixtral-8x7b", sliding_window=4096)
    assert {attention(layer).spec.mask.window for layer in windowed.layers} == {4096}
    assert {slot.window for slot in windowed.slots if isinstance(slot, KVSlot)} == {4096}
    silent = {key: value for key, value in PUBLISHED["mixtral-8x7b"].items() if key != "sliding_window"}
    assert describe(silent).attention[0].mask.window is None


def test_mixtral_turns_at_a_base_of_a_million_where_the_file_is_silent() -> None:
    silent = {key: value for key, value in PUBLISHED["mixtral-8x7b"].items() if key != "rope_theta"}
    assert describe(silent).program == describe(PUBLISHED["mixtral-8x7b"]).program


def test_qwen3_moe_normalises_each_head_and_divides_weights_only_if_told() -> None:
    described = program("qwen3-30b-a3b")
    assert attention(described.layers[0]).qk_norm == Norm("rms", 128, 1e-6)
    assert mlp(described.layers[0]) == Experts(FeedForward(2048, 768, "silu"), 128, 8, normalise=True)
    silent = {key: value for key, value in PUBLISHED["qwen3-30b-a3b"].items() if key != "norm_topk_prob"}
    undivided = describe(silent).program
    assert undivided is not None
    assert mlp(undivided.layers[0]) == Experts(FeedForward(2048, 768, "silu"), 128, 8, normalise=False)


def test_qwen3_moe_has_experts_on_every_nth_layer_but_those_that_are_named() -> None:
    described = program("qwen3-30b-a3b", num_hidden_layers=6, decoder_sparse_step=2, mlp_only_layers=[3])
    assert [isinstance(mlp(layer), Experts) for layer in described.layers] == [False, True, False, False, False, True]
    assert mlp(described.layers[0]) == FeedForward(2048, 6144, "silu")
    everywhere = program("qwen3-30b-a3b", mlp_only_layers=None)
    assert all(isinstance(mlp(layer), Experts) for layer in everywhere.layers)


def test_qwen3_moe_has_a_window_on_all_layers_if_it_is_switched_on() -> None:
    windowed = program("qwen3-30b-a3b", use_sliding_window=True, sliding_window=512, max_window_layers=7)
    assert {attention(layer).spec.mask.window for layer in windowed.layers} == {512}
    off = program("qwen3-30b-a3b", sliding_window=512)
    assert {attention(layer).spec.mask.window for layer in off.layers} == {None}


def test_qwen3_moe_biases_are_on_all_four_projections() -> None:
    op = attention(program("qwen3-30b-a3b", attention_bias=True).layers[0])
    assert op.q_bias and op.k_bias and op.v_bias and op.o_bias


ROWS: list[tuple[str, dict[str, Any], str, list[str]]] = [
    ("mixtral-8x7b", {"num_local_experts": 0}, "num_local_experts", ['"num_local_experts": 0', "above zero"]),
    ("mixtral-8x7b", {"num_local_experts": None}, "num_local_experts", ['lacks "num_local_experts"']),
    ("mixtral-8x7b", {"num_experts_per_tok": None}, "num_experts_per_tok", ['lacks "num_experts_per_tok"']),
    ("mixtral-8x7b", {"num_experts_per_tok": 9}, "num_experts_per_tok", ["9 of 8 experts", "at most"]),
    ("mixtral-8x7b", {"num_experts": 4}, "num_experts", ["num_local_experts = 8", "num_experts = 4", "one thing"]),
    ("mixtral-8x7b", {"sliding_window": 0}, "sliding_window", ['"sliding_window": 0']),
    ("mixtral-8x7b", {"norm_topk_prob": False}, "norm_topk_prob", ["read by nobody"]),
    ("mixtral-8x7b", {"hidden_act": "xielu"}, "hidden_act", ["hidden_act = 'xielu'"]),
    ("qwen3-30b-a3b", {"moe_intermediate_size": None}, "moe_intermediate_size", ['lacks "moe_intermediate_size"']),
    ("qwen3-30b-a3b", {"decoder_sparse_step": 0}, "decoder_sparse_step", ['"decoder_sparse_step": 0', "above zero"]),
    ("qwen3-30b-a3b", {"mlp_only_layers": [48]}, "mlp_only_layers", ["[48]", "from 0 to 47"]),
    ("qwen3-30b-a3b", {"mlp_only_layers": ["1"]}, "mlp_only_layers", ["['1']", "from 0 to 47"]),
    ("qwen3-30b-a3b", {"shared_expert_intermediate_size": 8}, "shared_expert_intermediate_size", ["read by nobody"]),
    ("qwen3-30b-a3b", {"model_type": "qwen2_moe"}, "model_type", ["'qwen2_moe'", "mixtral, qwen3_moe"]),
]


@pytest.mark.parametrize(("name", "changes", "key", "words"), ROWS, ids=[f"{row[2]}-{i}" for i, row in enumerate(ROWS)])
def test_a_config_that_cannot_be_honoured_is_refused(
    name: str, changes: dict[str, Any], key: str, words: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        describe({**PUBLISHED[name], **changes})
    assert caught.value.key == key
    for word in words:
        assert word in str(caught.value)
