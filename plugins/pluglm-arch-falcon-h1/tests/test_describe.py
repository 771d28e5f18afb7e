"""Configs with the keys and sizes of published models become the program that Falcon-H1 means."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pluglm_arch_falcon_h1 import pluglm_describe_model as describe

from pluglm.contracts import Attention, DecoderProgram, FeedForward, KVSlot, Norm, Part, StateSpace

PUBLISHED: dict[str, dict[str, Any]] = json.loads(Path(__file__).with_name("published.json").read_text())


def program(name: str = "falcon-h1-0.5b", **changes: Any) -> DecoderProgram:
    described = describe({**PUBLISHED[name], **changes}).program
    assert described is not None
    return described


def parts(described: DecoderProgram, layer: int = 0) -> tuple[Part, Part, Part]:
    mixers, mlp = described.layers[layer].branches
    return mixers.parts[0], mixers.parts[1], mlp.parts[0]


def mixer(described: DecoderProgram) -> StateSpace:
    op = parts(described)[1].op
    assert isinstance(op, StateSpace)
    return op


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_is_read_and_every_key_accounted_for(name: str) -> None:
    config = PUBLISHED[name]
    described = describe(config)
    assert (described.model_type, described.num_layers) == ("falcon_h1", config["num_hidden_layers"])
    assert {key.partition(".")[0] for key in described.used} | set(described.ignored) >= set(config)
    assert described.program is not None
    text = json.dumps(described.program.to_json(), allow_nan=False)
    assert DecoderProgram.from_json(json.loads(text)) == described.program
    assert described.max_seq_len == config["max_position_embeddings"]


def test_both_spellings_of_rotary_positions_mean_the_same() -> None:
    config = {key: value for key, value in PUBLISHED["falcon-h1-7b"].items() if not key.startswith("rope_")}
    newer = {**config, "rope_parameters": {"rope_type": "default", "rope_theta": 100000000000.0}}
    assert describe(newer).program == program("falcon-h1-7b")
    rope = parts(program("falcon-h1-7b"))[0].op.rope  # type: ignore[union-attr]
    assert (rope.theta, rope.dim, rope.kind) == (1e11, 128, "default")


def test_attention_and_the_state_space_share_a_norm_and_are_added() -> None:
    described = program()
    attn, ssm, mlp = parts(described, 7)
    assert (attn.name, attn.norm_in, ssm.name, ssm.norm_in) == ("attn", Norm("rms", 1024, 1e-5), "ssm", None)
    assert ssm.share_norm_in
    assert mlp.norm_in == attn.norm_in == described.final_norm
    assert isinstance(mlp.op, FeedForward)
    assert mlp.op.gated


def test_each_layer_has_a_slot_for_keys_and_one_for_states() -> None:
    described = program()
    attn, ssm, _ = parts(described, 7)
    assert (attn.op.slot, ssm.op.slot) == (14, 15)  # type: ignore[union-attr]
    assert described.slots[14:16] == (KVSlot(2, 64, 64), mixer(described).state_slot)
    assert len(described.slots) == 72


def test_every_multiplier_has_its_place() -> None:
    described = program()
    attn, ssm, mlp = parts(described)
    assert isinstance(attn.op, Attention)
    assert isinstance(mlp.op, FeedForward)
    assert attn.op.spec.scale == 64**-0.5 * 0.390625
    assert (attn.scale_in, attn.scale_out) == (1.0, 0.9375)
    assert (ssm.scale_in, ssm.scale_out) == (1.25, 0.23570226039551587)
    assert mixer(described).multipliers == (0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738)
    assert (mlp.op.gate_scale, mlp.op.down_scale) == (0.8838834764831844, 0.5859375)
    assert (described.embedding.scale, described.head.scale) == (5.656854249492381, 0.0390625)


def test_multipliers_that_a_file_leaves_out_are_one() -> None:
    described = program("falcon-h1-7b")
    attn, ssm, mlp = parts(described)
    assert isinstance(mlp.op, FeedForward)
    assert {attn.scale_in, attn.scale_out, ssm.scale_in, ssm.scale_out, mlp.op.gate_scale, mlp.op.down_scale} == {1.0}
    assert mixer(described).multipliers == (1.0,) * 5
    assert described.embedding.scale == described.head.scale == 1.0


def test_without_a_norm_of_its_own_the_mixer_is_only_gated() -> None:
    op = mixer(program(mamba_rms_norm=False, mamba_n_groups=2, mamba_norm_before_gate=True))
    assert (op.norm, op.norm_groups, op.norm_before_gate) == (None, 1, False)


@pytest.mark.parametrize("before", [False, True])
def test_a_norm_of_the_mixer_is_over_its_groups_on_either_side_of_the_gate(before: bool) -> None:
    op = mixer(program(mamba_rms_norm=True, mamba_n_groups=2, mamba_norm_before_gate=before))
    assert op.norm == Norm("rms", 1536, 1e-5, cast_late=True)
    assert (op.norm_groups, op.norm_before_gate, op.num_groups) == (2, before, 2)


def test_biases_follow_their_five_switches() -> None:
    def biases(**changes: Any) -> list[bool]:
        attn, ssm, mlp = (part.op for part in parts(program(**changes)))
        assert isinstance(attn, Attention) and isinstance(ssm, StateSpace) and isinstance(mlp, FeedForward)
        assert attn.q_bias == attn.k_bias == attn.v_bias == attn.o_bias
        return [attn.q_bias, mlp.bias, ssm.in_bias, ssm.out_bias, ssm.conv_bias]

    switches = ("attention_bias", "mlp_bias", "mamba_proj_bias", "projectors_bias", "mamba_conv_bias")
    off = dict.fromkeys(switches, False)
    for i, name in enumerate(switches):
        assert biases(**{**off, name: True}) == [j == i for j in range(5)]


@pytest.mark.parametrize(
    ("changes", "sizes"),
    [
        ({}, (1536, 24, 64)),
        ({"mamba_d_ssm": None, "mamba_d_head": "auto", "mamba_n_heads": 32}, (2048, 32, 64)),
        ({"mamba_d_ssm": None, "mamba_d_head": 96, "mamba_expand": 3, "mamba_n_heads": 32}, (3072, 32, 96)),
        ({"mamba_d_head": None}, (1536, 24, 64)),
    ],
)
def test_the_mixers_size_is_the_files_or_follows_from_the_models(
    changes: dict[str, Any], sizes: tuple[int, int, int]
) -> None:
    op = mixer(program(**changes))
    assert (op.inner_size, op.num_heads, op.head_dim) == sizes


def test_the_limit_of_the_time_step_is_read() -> None:
    assert (mixer(program()).dt_min, mixer(program()).dt_max) == (0.0, None)
    op = mixer(program(time_step_limit=[0.001, 0.1]))
    assert (op.dt_min, op.dt_max) == (0.001, 0.1)


def test_one_activation_serves_the_convolution_and_the_feed_forward() -> None:
    described = program(hidden_act="gelu_pytorch_tanh")
    assert mixer(described).activation == parts(described)[2].op.activation == "gelu_tanh"  # type: ignore[union-attr]


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_target_of_the_weight_map_is_named_once_and_reads_back(name: str) -> None:
    weights = describe({**PUBLISHED[name], "mlp_bias": True, "attention_bias": True}).weights
    targets = [target for rule in weights.rules for target in rule.targets]
    sources = [source for rule in weights.rules for source in rule.sources]
    assert len(set(targets)) == len(targets) == len(set(sources)) == len(sources)
    assert all(rule.transform is None for rule in weights.rules)


def test_a_tied_head_may_be_repeated_in_the_file_but_must_equal_the_embedding() -> None:
    head = describe({**PUBLISHED["falcon-h1-7b"], "tie_word_embeddings": True}).weights.rules[-1]
    assert (head.sources, head.optional, head.tied_to) == (("lm_head.weight",), True, "embed.weight")
    assert not describe(PUBLISHED["falcon-h1-7b"]).weights.rules[-1].optional


def test_describing_a_model_imports_no_torch() -> None:
    code = (
        "import json, sys; from pluglm_arch_falcon_h1 import pluglm_describe_model as d\n"
        "for config in json.load(sys.stdin).values(): d(config)\n"
        "heavy = [m for m in ('torch', 'numpy') if m in sys.modules]; assert not heavy, heavy"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], input=json.dumps(PUBLISHED), text=True, capture_output=True, check=False
    )
    assert result.returncode == 0, result.stderr
